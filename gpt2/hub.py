"""The Hugging Face hub: whether it can be reached, and its datasets as a source of text, as gpt2/sources.py has it.

It is asked once: its own client tries for half a minute before it says no.
"""

import errno
import os
import time
from pathlib import Path

from gpt2.errors import UserError, first_line
from gpt2.sources import Columns, Record

HUB_PATIENCE = 6  # attempts in a row that bring no row, before a run gives up; the pauses between them double
ROWS_A_STATE = 100  # rows of the hub between two notes of where its reader stands
NETWORK_LIBRARIES = {"aiohttp", "h11", "http", "httpcore", "httpx", "requests", "socket", "ssl", "urllib3"}
NETWORK_ERRNOS = {errno.ECONNRESET, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.EPIPE}


def reachable():
    """Whether the hub may be asked and answers within 5 seconds."""
    if "HF_HUB_OFFLINE" in os.environ:
        return os.environ["HF_HUB_OFFLINE"].lower() in ("", "0", "false", "no", "off")
    import urllib.error
    import urllib.request

    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        return False
    return True


def import_datasets():
    """The module `datasets`; where the hub does not answer, in its offline mode, which uses the local cache alone."""
    if not reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the module is imported
    import datasets

    return datasets


def commit(dataset, revision):
    """The commit for which `revision` (None: the newest) stands now, for a continued preparation to read the same data.

    As given where the hub cannot be asked, and for a folder.
    """
    if os.path.isdir(dataset):
        return revision
    import_datasets()  # which finds out whether the hub answers
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(dataset, revision=revision).sha
    except Exception:  # its kinds change with its HTTP library; loading says what is wrong
        return revision


def causes(error):
    """The error and what it came from, in turn."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def status_of(error):
    """The HTTP status that an error, or one that it came from, carries; None where none does."""
    for cause in causes(error):
        for owner in (getattr(cause, "response", None), cause):
            for name in ("status_code", "status"):
                if isinstance(status := getattr(owner, name, None), int):
                    return status
    return None


def passes(error):
    """Whether the same request may succeed later: a server is busy or broken, a connection slow or lost."""
    if (status := status_of(error)) is not None:
        return status in (408, 425, 429) or status >= 500
    return any(
        isinstance(cause, ConnectionError | TimeoutError)
        or isinstance(cause, OSError)
        and cause.errno in NETWORK_ERRNOS
        or type(cause).__module__.partition(".")[0] in NETWORK_LIBRARIES
        for cause in causes(error)
    )


def explained(error, dataset):
    """What is wrong with a dataset, whole and in one line, and the way out."""
    problem = " ".join(str(error).split()) or first_line(error)
    status, kinds = status_of(error), {type(cause).__name__ for cause in causes(error)}
    if status in (401, 403) or "GatedRepoError" in kinds:
        way = f"log in with `hf auth login`, and accept its terms at https://huggingface.co/datasets/{dataset}"
    elif status == 404 or kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
        way = "look up the right --dataset, --name, --split and --revision"
    elif kinds & {"CastError", "DatasetGenerationCastError"}:
        way = (
            "its files differ in their columns: download them and give them as --input, which reads --text_column alone"
        )
    else:
        way = "files that were downloaded, or text of your own, are prepared with --input FILE_OR_GLOB ..."
    return f"{problem}; {way}"


class Hub:
    """Documents of a dataset, streamed with the library `datasets`: one of the hub's, or a folder on this machine.

    found: the identity of a preparation that is continued, whose commit stands where the revision asked for is the same
    or none; or None. A row that cannot be fetched for a reason that
    passes is tried again, with growing pauses, from where the reader stood.
    """

    def __init__(self, args, found=None):
        self.args, self.columns, self.name = args, Columns(args), Path(args.dataset).name
        known, asked = (found or {}).get("revision"), (found or {}).get("revision_asked")
        if known and args.revision in (None, known, asked):
            self.revision = known
        else:
            self.revision, asked = commit(args.dataset, args.revision), args.revision
        self.identity = {"dataset": args.dataset, "name": args.name, "split": args.split, "revision": self.revision}
        self.identity |= {"revision_asked": asked} if asked else {}

    def open(self):
        """Find out how much there is. UserError where the dataset cannot be had."""
        datasets, args = import_datasets(), self.args
        self.load = lambda: datasets.load_dataset(
            args.dataset, args.name, split=args.split, streaming=True, revision=self.revision
        )
        try:
            splits = self.load().info.splits or {}
        except Exception as error:  # every layer below has errors of its own
            offline = not os.path.isdir(args.dataset) and (passes(error) or not reachable())
            way = "text of your own is prepared with --input FILE_OR_GLOB ..."
            what = f"the Hugging Face hub cannot be reached; {way}" if offline else explained(error, args.dataset)
            raise UserError(f"{args.dataset}: {what}") from None
        self.rows, self.bytes = (getattr(splits.get(args.split), what, None) for what in ("num_examples", "num_bytes"))

    def text_bytes(self):
        return self.bytes

    def records(self, position=None):
        position = position or {}
        self.columns.counts.update({name: position.get(name, 0) for name in self.columns.counts})
        number = position.get("number", 0)
        for state, since, row in self.patiently(position.get("state"), position.get("since", 0)):
            if number == 0:
                self.columns.check(self.args.dataset, row)
            where = {"state": state, "since": since, "number": number} | self.columns.counts
            place = f"{self.args.dataset}: row {number}"
            text = self.columns.document(row.get(self.columns.text), row, place)
            if text is not None:
                yield Record(text, True, where, min(1.0, number / self.rows) if self.rows else None, place)
            number += 1

    def patiently(self, state, since):
        """(state of the reader, rows since then, row), from the `since`-th row after `state` on.

        Failures of the network do not end it.
        """
        failures = 0
        while True:
            try:
                dataset, read = self.load(), 0
                if state:
                    dataset.load_state_dict(state)
                for row in dataset:
                    if read == since:
                        yield state, since, row
                        since, failures = since + 1, 0
                    read += 1
                    if read == since == ROWS_A_STATE:
                        state, since, read = dataset.state_dict(), 0, 0
                return
            except UserError:
                raise
            except Exception as error:  # every layer below has errors of its own
                if not passes(error):
                    raise UserError(
                        f"{self.args.dataset}: cannot be read: {explained(error, self.args.dataset)}"
                    ) from None
                failures += 1
                if failures == HUB_PATIENCE:
                    raise UserError(
                        f"{self.args.dataset}: cannot be read on ({type(error).__name__}: {first_line(error)}); "
                        "when the network is back, the same command continues"
                    ) from None
                time.sleep(2**failures)

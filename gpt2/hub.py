"""The Hugging Face hub: whether it can be reached, asked once (its own client retries for half a minute before it says no), and
its datasets as a source of text, document by document, as gpt2/sources.py has it."""

import os
import time
from pathlib import Path

from gpt2.errors import UserError
from gpt2.sources import Columns, Record

HUB_PATIENCE = 6  # attempts in a row that bring no row, before a run gives up; the pauses between them double
ROWS_A_STATE = 100  # rows of the hub between two notes of where its reader stands


def import_datasets():
    """The module `datasets`; where the hub does not answer within 5 seconds, in its offline mode, which uses the local cache alone."""
    if "HF_HUB_OFFLINE" not in os.environ:
        import urllib.error
        import urllib.request

        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"  # read when the module is imported
    import datasets

    return datasets


def commit(dataset, revision):
    """The commit for which `revision` (None: the newest) stands now, so that a continued preparation reads the same data; as given where the
    hub cannot be asked, and for a folder."""
    if os.path.isdir(dataset):
        return revision
    import_datasets()  # which finds out whether the hub answers
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(dataset, revision=revision).sha
    except Exception:  # its kinds change with its HTTP library; loading says what is wrong
        return revision


class Hub:
    """Documents of a dataset, streamed with the library `datasets`: one of the Hugging Face hub's, or a folder on this machine.

    revision: the commit of a preparation that is continued, or None. A row that cannot be fetched is tried again, with growing pauses,
    from where the reader stood.
    """

    def __init__(self, args, revision):
        self.args, self.columns, self.name = args, Columns(args), Path(args.dataset).name
        self.revision = revision if revision and not args.revision else commit(args.dataset, args.revision)
        self.identity = {"dataset": args.dataset, "name": args.name, "split": args.split, "revision": self.revision}

    def open(self):
        """Find out how much there is. UserError where the dataset cannot be had."""
        datasets, args = import_datasets(), self.args
        self.load = lambda: datasets.load_dataset(
            args.dataset, args.name, split=args.split, streaming=True, revision=self.revision
        )
        try:
            splits = self.load().info.splits or {}
        except (ConnectionError, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            offline = not os.path.isdir(args.dataset) and (
                isinstance(error, ConnectionError) or "HF_HUB_OFFLINE" in os.environ
            )
            what = "the Hugging Face hub cannot be reached" if offline else str(error).splitlines()[0]
            raise UserError(
                f"{args.dataset}: {what}; text of your own is prepared with --input FILE_OR_GLOB ..."
            ) from None
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
            number += 1
            text = self.columns.document(row.get(self.columns.text), row, f"{self.args.dataset}: row {number - 1}")
            if text is not None:
                yield Record(text, True, where, where["number"] / self.rows if self.rows else None)

    def patiently(self, state, since):
        """(state of the reader, rows since then, row), from the `since`-th row after `state` on, through failures of the network."""
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
                failures += 1
                if failures == HUB_PATIENCE:
                    raise UserError(
                        f"{self.args.dataset}: cannot be read on ({type(error).__name__}: {str(error).splitlines()[0]}); "
                        "the same command continues"
                    ) from None
                time.sleep(2**failures)

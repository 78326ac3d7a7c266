import pytest
import torch

from gpt2.model import GPT, GPTConfig
from gpt2.sample import generate
from tests.conftest import PRUNED, SMALL, refused, run


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 300)
    run(
        "prepare_fineweb.py",
        "--input",
        folder / "text.txt",
        "--out_dir",
        folder / "data",
        "--tokenizer",
        "char",
        "--val_tokens",
        "2000",
    )
    run(
        "train_gpt2.py",
        *SMALL,
        *PRUNED,
        f"--data_dir={folder / 'data'}",
        f"--out_dir={folder / 'run'}",
        "--gradient_accumulation_steps=2",
    )
    return folder / "run"


def test_sampling_is_repeatable_and_continues_the_prompt(a_run):
    arguments = ["--prompt", "the cat", "--num_samples", "2", "--max_new_tokens", "30", "--device", "cpu"]
    first, second, other = (run("-m gpt2.sample", a_run, *arguments, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == second != other
    samples = first.rstrip("\n").split("\n---------------\n")
    assert len(samples) == 2 and all(
        s.startswith("the cat") and 30 < len(s) <= 37 for s in samples
    )  # end-of-text is silent


def test_evaluation_of_a_checkpoint_gives_the_runs_own_loss(a_run):
    from tests.conftest import metrics_of

    tokens = 3 * 2 * 16  # eval_iters * batch_size * block_size: those that the run looks at
    printed = run("-m gpt2.evaluate", a_run, "--tokens", tokens, "--device", "cpu").stdout
    assert f"val_loss {metrics_of(a_run)[-1]['val_loss']:.4f}" in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", "Ω"], "'Ω'"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--num_samples", "0"], "--num_samples"),
        (["--seed", 2**64], "--seed"),
    ],
)
def test_bad_requests_are_one_line(a_run, arguments, words):
    lines = refused(run("-m gpt2.sample", a_run, *arguments, check=False))
    assert len(lines) == 1 and words in lines[0]


def test_a_folder_without_a_run_is_one_line(tmp_path):
    lines = refused(run("-m gpt2.sample", tmp_path, check=False))
    assert len(lines) == 1 and "holds no checkpoint" in lines[0]


def test_greedy_and_top_1_take_the_likeliest_token_beyond_the_context_too():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=16)).eval()
    prompt = torch.tensor([[1, 2, 3]])
    greedy = generate(model, prompt, 12, temperature=0, top_k=0, generator=None)
    top_1 = generate(model, prompt, 12, temperature=1.0, top_k=1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(greedy, top_1)
    for length in range(3, 15):
        assert greedy[0, length] == model(greedy[:, max(0, length - 8) : length])[0][0, -1].argmax()

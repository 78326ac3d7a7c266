import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from pruning.integrations import PruningCallback  # noqa: E402
from tests.pruning.helpers import zeros_of  # noqa: E402


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = (torch.arange(16) * (index % 3 + 1) + index) % 50
        return {"input_ids": ids, "labels": ids}


def trainer(folder, **changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=24,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        logging_steps=4,
        save_steps=12,
        disable_tqdm=True,
        **changes,
    )
    callback = PruningCallback(criterion="bitter7", target_sparsity=0.6, interval=2)
    model = transformers.GPT2LMHeadModel(config)
    return transformers.Trainer(model, arguments, train_dataset=Tokens(), callbacks=[callback]), model, callback


def test_the_real_trainer_ends_at_the_exact_sparsity_and_resumes(tmp_path):
    run, model, callback = trainer(tmp_path)
    run.train()
    zero = zeros_of(model)
    assert zero.sum() == round(0.6 * zero.size) == callback.pruner.pruned
    assert [log["sparsity"] for log in run.state.log_history if "sparsity" in log][-1] == callback.pruner.sparsity
    again, resumed, _ = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert (zeros_of(resumed) == zero).all()

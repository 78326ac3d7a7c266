import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from pruning import Pruner  # noqa: E402
from pruning.integrations import PruningCallback  # noqa: E402
from tests.pruning.helpers import zeros_of  # noqa: E402


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = (torch.arange(16) * (index % 3 + 1) + index) % 50
        return {"input_ids": ids, "labels": ids}


def trainer(folder, arguments=None, **options):
    """(Trainer, model, callback) of 24 steps, with changes of TrainingArguments and of the callback's options."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    defaults = dict(
        max_steps=24,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        logging_steps=4,
        save_steps=12,
        disable_tqdm=True,
    )
    arguments = transformers.TrainingArguments(str(folder), **(defaults | (arguments or {})))
    callback = PruningCallback(**(dict(criterion="bitter7", target_sparsity=0.6, interval=2) | options))
    model = transformers.GPT2LMHeadModel(config)
    data = dict(train_dataset=Tokens(), eval_dataset=Tokens())
    return transformers.Trainer(model, arguments, **data, callbacks=[callback]), model, callback


def test_the_real_trainer_ends_at_the_exact_sparsity_and_resumes(tmp_path):
    run, model, callback = trainer(tmp_path)
    run.train()
    zero = zeros_of(model)
    assert zero.sum() == round(0.6 * zero.size) == callback.pruner.pruned
    assert [log["sparsity"] for log in run.state.log_history if "sparsity" in log][-1] == callback.pruner.sparsity
    again, resumed, _ = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert (zeros_of(resumed) == zero).all()


def test_a_layer_that_was_pruned_away_does_not_come_back_on_resuming(tmp_path):
    options = dict(target_sparsity=0.97, max_layer_sparsity=1.0, begin=3, end=11, criterion=one_layer_first)
    whole, model, callback = trainer(tmp_path, **options)
    whole.train()
    zeros = callback.pruner.layer_sparsity()
    assert 1.0 in zeros.values()
    again, _, resumed = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert resumed.pruner.layer_sparsity() == zeros


def one_layer_first(weight):
    return weight.abs() * (weight.shape[0] != weight.shape[1])


def sparse_model(share=0.6):
    """A GPT-2 of which `share` was pruned, as from_pretrained gives it."""
    _, model, _ = trainer("unused")
    Pruner(model, torch.optim.AdamW(model.parameters())).prune_to(share)
    return model


def with_model(run, model):
    run.model.load_state_dict(model.state_dict())
    return run


def test_a_reloaded_sparse_model_keeps_its_zeros_from_the_first_step(tmp_path):
    run, model, callback = trainer(tmp_path, begin=20, end=20, target_sparsity=0.7)
    before = zeros_of(sparse_model())
    with_model(run, sparse_model()).train()
    assert zeros_of(model)[before].all() and callback.pruner.sparsity == pytest.approx(0.7, abs=1e-3)
    assert all(log["sparsity"] > 0.59 for log in run.state.log_history)


def test_keep_zeros_can_be_turned_off(tmp_path):
    run, model, _ = trainer(tmp_path, begin=24, end=24, target_sparsity=0.3, keep_zeros=False)
    with_model(run, sparse_model()).train()
    assert zeros_of(model).mean() < 0.5


def test_a_second_train_goes_on_from_the_zeros(tmp_path):
    run, model, callback = trainer(tmp_path)
    run.train()
    before = zeros_of(model)
    run.train()
    assert zeros_of(model)[before].all() and zeros_of(model).sum() == before.sum()
    assert callback.pruner.steps == 24 and not callback.hooks
    assert all(log["sparsity"] > 0.59 for log in run.state.log_history if "sparsity" in log)


def test_a_best_model_from_before_the_end_is_not_passed_off_as_sparse(tmp_path):
    run, model, callback = trainer(
        tmp_path,
        arguments=dict(
            load_best_model_at_end=True,
            eval_strategy="steps",
            eval_steps=12,
            metric_for_best_model="loss",
            save_steps=12,
        ),
    )
    losses = iter([1.0, 2.0])  # the first evaluation, at step 12, is the best
    run.evaluation_loop, real = lambda *a, **k: spoiled(real(*a, **k), next(losses)), run.evaluation_loop
    with pytest.warns(UserWarning, match=r"the model is .*% sparse: .* were pruned are not zero.*checkpoint-12"):
        run.train()
    zero = zeros_of(model)
    assert callback.pruner.sparsity == zero.mean() < 0.6
    assert run.state.log_history[-1]["sparsity"] == zero.mean(), "the Trainer's last line is of the model it leaves"


def spoiled(output, loss):
    output.metrics["eval_loss"] = loss
    return output


def test_weights_set_anew_in_training_are_noticed(tmp_path):
    run, model, _ = trainer(tmp_path, begin=2, end=4)

    class Waking(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            if state.global_step == 5:
                with torch.no_grad():
                    model.transformer.h[0].mlp.c_fc.weight.fill_(0.1)

    run.add_callback(Waking())
    with pytest.raises(RuntimeError, match="pruned weights are not zero any more"):
        run.train()

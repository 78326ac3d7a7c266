"""transformers.Trainer with one callback more: python examples/hugging_face_trainer.py

The model is a GPT-2 made from its config, so that the example runs without a network; from_pretrained works the same.
"""

import torch
import transformers

from pruning.integrations import PruningCallback


class Counting(torch.utils.data.Dataset):
    """Sequences that count up by 1, 2 or 3: a next token that can be learnt."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        ids = (torch.arange(32) * (index % 3 + 1) + index) % 64
        return {"input_ids": ids, "labels": ids}


def main(steps=200, folder="out/trainer"):
    transformers.set_seed(0)
    sizes = dict(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        logging_steps=max(1, steps // 8),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    pruning = PruningCallback(criterion="bitter7", target_sparsity=0.7, interval=5)  # from 25 % to 75 % of the steps
    transformers.Trainer(model, arguments, train_dataset=Counting(), callbacks=[pruning]).train()
    print(pruning.pruner.report())
    return model


if __name__ == "__main__":
    main()

"""Hugging Face accelerate: python examples/accelerate_loop.py, or accelerate launch examples/accelerate_loop.py

The Pruner is given what `prepare` returns: the wrapped model, and the optimizer inside accelerate's.
"""

import accelerate
import torch

from pruning import Pruner


def main(steps=300):
    accelerate.utils.set_seed(0)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    x = torch.randn(4096, 32)
    data = torch.utils.data.TensorDataset(x, (x @ torch.randn(32, 4)).argmax(1))
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.ReLU(), torch.nn.Linear(128, 4))
    optimizer, loader = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.utils.data.DataLoader(data, 64, True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    pruner = Pruner(model, optimizer.optimizer, "bitter7", target_sparsity=0.8, begin=steps // 4, end=steps * 3 // 4)
    step = 0
    while step < steps:
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    pruner.mask_gradients()
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                pruner.step()
                step += 1
            if step == steps:
                break
    accelerator.print(f"loss {loss.item():.4f}\n{pruner.report()}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()

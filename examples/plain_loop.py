"""A plain PyTorch loop that prunes while it trains: python examples/plain_loop.py"""

import torch

from pruning import Pruner


def main(steps=400):
    torch.manual_seed(0)
    x = torch.randn(4096, 32)
    y = torch.sin(x @ torch.randn(32, 1)) + 0.1 * torch.randn(4096, 1)
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    begin, end = steps // 4, steps * 3 // 4
    pruner = Pruner(model, optimizer, "bitter7", target_sparsity=0.9, begin=begin, end=end, interval=10)
    for _ in range(steps):
        batch = torch.randint(0, len(x), (128,))
        loss = torch.nn.functional.mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step()
    print(f"loss {loss.item():.4f}\n{pruner.report()}")
    return model


if __name__ == "__main__":
    main()

"""A script written for DeepSpeed: all that differs under meshbolt is the line that imports it."""

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

SAMPLES, STEPS = 3, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 1))

    def forward(self, x):
        return self.layers(x)


class Numbers(torch.utils.data.Dataset):
    def __init__(self, window):
        draw = torch.Generator().manual_seed(3)
        count = SAMPLES * STEPS * window * int(os.environ["WORLD_SIZE"])
        self.x, self.y = torch.randn(count, 6, generator=draw), 3 * torch.randn(count, 1, generator=draw)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--folder")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--client", action="store_true")
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    deepspeed.init_distributed(dist_backend="gloo")
    window = json.loads(Path(args.deepspeed_config).read_text())["gradient_accumulation_steps"]
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) if args.client else None
    engine, _, loader, _ = deepspeed.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model.parameters(),
        training_data=Numbers(window),
    )
    device = deepspeed.get_accelerator().device_name(engine.local_rank)
    if args.resume:
        path, client_state = engine.load_checkpoint(args.folder)
        assert path is not None
        assert client_state["seen"] == STEPS * window

    losses, norms, rates = [], [], []
    engine.train()
    for x, y in loader:
        loss = F.mse_loss(engine(x.to(device)), y.to(device))
        engine.backward(loss)
        boundary = engine.is_gradient_accumulation_boundary()
        engine.step()
        losses.append(loss.item())
        if boundary:
            rates.append(engine.get_lr()[0])
            norm = engine.get_global_grad_norm()
            norms.append(None if norm is None else float(norm))
    if not args.resume:
        engine.save_checkpoint(args.folder, client_state={"seen": len(losses)})
    told = {
        "losses": losses,
        "rates": rates,
        "norms": norms,
        "numbers": [engine.global_steps, engine.global_samples, engine.skipped_steps, engine.train_batch_size()],
        "stage": engine.zero_optimization_stage(),
    }
    Path(args.folder, f"told_{torch.distributed.get_rank()}.json").write_text(json.dumps(told))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()

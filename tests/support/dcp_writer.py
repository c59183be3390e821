"""Writes distributed checkpoints as training does: one process of several, on gloo.

python -m tests.support.dcp_writer KIND FOLDER RENDEZVOUS RANK WORLD
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


def config() -> Any:
    import transformers as hf

    return hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=101, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def fsdp(folder: Path, world: int) -> None:
    """A Llama that FSDP2 has trained for two steps, with its optimizer's state, at each step."""
    import transformers as hf
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    net: Any = hf.LlamaForCausalLM(config()).to(torch.bfloat16)
    for layer in net.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(2):
        tokens = torch.randint(0, 101, (2, 8))
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model, state = get_state_dict(net, optimizer)
        content = {"model": model, "optim": state, "step": step}
        save(content, checkpoint_id=str(folder / f"step-{step}"))


def sharded(folder: Path, world: int) -> None:
    """Tensors cut along each of their dimensions, unevenly, and copies."""
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    tensors = {}
    for name, shape, placement in (
        ("rows", (7, 5), Shard(0)),
        ("columns", (6, 9), Shard(1)),
        ("middle", (3, 5, 4), Shard(1)),
        ("last", (3, 4, 5), Shard(2)),
        ("copies", (4, 4), Replicate()),
        ("small", (1, 3), Shard(0)),
    ):
        size = torch.Size(shape).numel()
        whole = torch.arange(size, dtype=torch.float32).view(shape)
        tensors[name] = distribute_tensor(whole, mesh, [placement])
    save(tensors, checkpoint_id=str(folder))


def main(kind: str, folder: str, rendezvous: str, rank: str, world: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world)
    )
    {"fsdp": fsdp, "sharded": sharded}[kind](Path(folder), int(world))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

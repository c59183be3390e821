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


def as_megatron(state: dict[str, torch.Tensor], heads: int, groups: int) -> dict[str, torch.Tensor]:
    """A Llama's tensors as Megatron Core stores them: layers stacked, some matrices in one."""
    layers = sorted({int(name.split(".")[2]) for name in state if ".layers." in name})

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([state[f"model.layers.{layer}.{name}.weight"] for layer in layers])

    def grouped() -> torch.Tensor:
        every = []
        for layer in layers:
            q, k, v = (
                state[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"
            )
            size = k.shape[0] // groups
            rows = []
            for group in range(groups):
                queries = heads // groups * size
                rows += [q[group * queries : (group + 1) * queries]]
                rows += [part[group * size : (group + 1) * size] for part in (k, v)]
            every.append(torch.cat(rows))
        return torch.stack(every)

    padding = torch.zeros(27, state["model.embed_tokens.weight"].shape[1], dtype=torch.bfloat16)
    at = "decoder.layers."
    return {
        "embedding.word_embeddings.weight": torch.cat(
            [state["model.embed_tokens.weight"], padding]
        ),
        f"{at}self_attention.linear_qkv.layer_norm_weight": stacked("input_layernorm"),
        f"{at}self_attention.linear_qkv.weight": grouped(),
        f"{at}self_attention.linear_proj.weight": stacked("self_attn.o_proj"),
        f"{at}mlp.linear_fc1.layer_norm_weight": stacked("post_attention_layernorm"),
        f"{at}mlp.linear_fc1.weight": torch.cat(
            [stacked("mlp.gate_proj"), stacked("mlp.up_proj")], dim=1
        ),
        f"{at}mlp.linear_fc2.weight": stacked("mlp.down_proj"),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": torch.cat([state["lm_head.weight"], padding]),
    }


def megatron(folder: Path, world: int) -> None:
    """Such tensors over the processes of a tensor-parallel group, with an optimizer's state."""
    import transformers as hf
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    net: Any = hf.LlamaForCausalLM(config()).to(torch.bfloat16)
    tensors = as_megatron(dict(net.state_dict()), 4, 2)
    cut: dict[str, Any] = {"optimizer.state.exp_avg": torch.zeros(4)}
    for name, tensor in tensors.items():
        rows = tensor.ndim - 2
        placement = Replicate() if "norm" in name else Shard(rows)
        if "linear_proj" in name or "linear_fc2" in name:
            placement = Shard(2)
        cut[name] = distribute_tensor(tensor, mesh, [placement])
    save(cut, checkpoint_id=str(folder))


def main(kind: str, folder: str, rendezvous: str, rank: str, world: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world)
    )
    {"fsdp": fsdp, "sharded": sharded, "megatron": megatron}[kind](Path(folder), int(world))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

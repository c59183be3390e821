"""Pipelines of several models, and models whose files diffusers names, against diffusers itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import merge_cli
from merge_cli.errors import MismatchError
from merge_cli.options import MergeOptions
from tests.support.hub_server import HubServer

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = MergeOptions(device="cpu", threads=1)
UNET, VAE, TEXT = "unet", "vae", "text_encoder"


def pipeline(folder: Path, seed: int) -> Any:
    """A Stable Diffusion of a few thousand weights, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    import transformers as hf

    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4, 8], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    text = hf.CLIPTextModel(hf.CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=100, bos_token_id=0, eos_token_id=2,
    ))  # fmt: skip
    whole = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    whole.save_pretrained(folder)
    return whole


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """A part's tensors, of all its shards."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found
    return found


def recipe(folder: Path, *models: str, method: str = "soup", **keys: Any) -> Path:
    path = folder / "recipe.yaml"
    listed = [{"model": model} for model in models]
    path.write_text(yaml.safe_dump({"merge_method": method, "models": listed, **keys}))
    return path


def test_a_soup_of_pipelines_is_a_pipeline(tmp_path: Path) -> None:
    first, second = (pipeline(tmp_path / name, seed) for seed, name in enumerate("ab"))
    path = recipe(tmp_path, "a", "b")
    notes = merge_cli.plan(path).notes
    assert "a: a pipeline; text_encoder, unet, vae are merged, everything else is copied" in notes
    out = merge_cli.merge(path, tmp_path / "out", options=OPTIONS).path
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = diffusers.DiffusionPipeline.from_pretrained(
            out, tokenizer=None, safety_checker=None, feature_extractor=None
        )
    for part in (UNET, VAE, TEXT):
        own, other = (dict(getattr(one, part).named_parameters()) for one in (first, second))
        for name, value in getattr(found, part).named_parameters():
            assert torch.equal(value, (own[name] + other[name]) / 2), f"{part}/{name}"
    file = Path("scheduler") / "scheduler_config.json"
    assert (out / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    assert not (out / "config.json").exists()
    assert "library_name: diffusers" in (out / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained" in (out / "README.md").read_text()
    # And a merge of it is a merge of any pipeline.
    again = merge_cli.merge(recipe(tmp_path, "out"), tmp_path / "again", options=OPTIONS).path
    for part, stem in ((UNET, "diffusion_pytorch_model"), (TEXT, "model")):
        file = Path(part) / f"{stem}.safetensors"
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_shards_and_filters_of_a_part(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        pipeline(tmp_path / name, seed)
    weight = [{"filter": "unet/", "value": 0.5}, {"value": 0.0}]
    path = recipe(tmp_path, "b", "c", method="ties", base_model="a", parameters={"weight": weight})
    single = merge_cli.merge(path, tmp_path / "one", options=OPTIONS).path
    cut = merge_cli.merge(path, tmp_path / "cut", options=OPTIONS, shard_size=8_000).path
    index = json.loads((cut / UNET / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert all((cut / UNET / file).is_file() for file in index["weight_map"].values())
    assert stored(cut / UNET).keys() == stored(single / UNET).keys()
    for part in (UNET, VAE, TEXT):
        mine, parts = stored(single / part), stored(cut / part)
        base = stored(tmp_path / "a" / part)
        assert all(torch.equal(mine[name], parts[name]) for name in mine)
        same = all(torch.equal(mine[name], base[name]) for name in mine)
        assert same is (part != UNET)


def test_a_part_alone_keeps_the_names_that_diffusers_looks_for(tmp_path: Path) -> None:
    first, second = (pipeline(tmp_path / name, seed) for seed, name in enumerate("ab"))
    path = recipe(tmp_path, "a/unet", "b/unet")
    out = merge_cli.merge(path, tmp_path / "out", options=OPTIONS).path
    import diffusers

    found = diffusers.UNet2DConditionModel.from_pretrained(out)
    own, other = dict(first.unet.named_parameters()), dict(second.unet.named_parameters())
    for name, value in found.named_parameters():
        assert torch.equal(value, (own[name] + other[name]) / 2)
    config = (out / "config.json").read_bytes()
    assert config == (tmp_path / "a" / UNET / "config.json").read_bytes()


def test_parts_that_differ_are_told(tmp_path: Path) -> None:
    import shutil

    for seed, name in enumerate("ab"):
        pipeline(tmp_path / name, seed)
    shutil.rmtree(tmp_path / "b" / VAE)
    with pytest.raises(MismatchError, match="vae/decoder"):
        merge_cli.plan(recipe(tmp_path, "a", "b"))


def test_a_pipeline_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    pipeline(tmp_path / "a", 0)
    pipeline(tmp_path / "b", 1)
    (tmp_path / "a" / UNET / "diffusion_pytorch_model.bin").write_bytes(b"never wanted" * 1000)
    for name in "ab":
        hub.add(f"org/{name}", tmp_path / name)
    here = merge_cli.merge(recipe(tmp_path, "a", "b"), tmp_path / "here", options=OPTIONS).path
    path = recipe(tmp_path, "org/a", "org/b")
    merge_cli.plan(path)
    assert hub.sent("model_index.json") > 0
    there = merge_cli.merge(path, tmp_path / "there", options=OPTIONS).path
    for file in here.rglob("*"):
        own = file.relative_to(here)
        if file.is_file() and not own.name.startswith(("merge_", "README")):
            assert (there / own).read_bytes() == file.read_bytes(), own
    assert hub.sent("diffusion_pytorch_model.bin") == 0

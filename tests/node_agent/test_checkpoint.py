"""A checkpoint opens only if it is whole and can be run; what is wrong with it is said before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.models.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedModelError,
    WeightMismatchError,
)
from spillway.node_agent.models.weights import check_weights

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def folder(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")


@pytest.fixture
def sharded(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """The same in several files with an index."""
    return shutil.copytree(tiny_checkpoint("llama", shard_size="60KB"), tmp_path / "sharded")


def edit_config(folder: Path, drop: tuple[str, ...] = (), **fields: Any) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**config, **fields}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class TestOpening:
    def test_a_folder_gives_its_spec(self, folder: Path) -> None:
        spec = Checkpoint.open(folder).spec
        assert (spec.model_type, spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == ("llama", 3, 4, 2, 16)
        assert spec == Checkpoint.open(str(folder)).spec

    @pytest.mark.parametrize(
        ("legacy", "modern"),
        [
            ({"rope_theta": 5000.0}, {"rope_type": "default", "rope_theta": 5000.0}),
            (
                {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
                {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
            ),
            (
                {
                    "rope_theta": 5000.0,
                    "rope_scaling": {
                        "rope_type": "llama3",
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 64,
                    },
                },
                {
                    "rope_theta": 5000.0,
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
        ],
        ids=["theta", "linear", "llama3"],
    )
    def test_old_and_new_spellings_of_rope_mean_the_same(self, folder: Path, legacy: Any, modern: Any) -> None:
        edit_config(folder, drop=("rope_parameters",), **legacy)
        old = Checkpoint.open(folder).spec
        edit_config(folder, drop=("rope_theta", "rope_scaling"), rope_parameters=modern)
        new = Checkpoint.open(folder).spec
        assert old == new
        edit_config(folder, drop=("rope_parameters",))
        assert Checkpoint.open(folder).spec.positions != new.positions, "the parameters were not ignored"

    def test_what_is_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError, match=r"no config\.json"):
            Checkpoint.open(tmp_path)
        with pytest.raises(CheckpointNotFoundError, match="not a folder"):
            Checkpoint.open(tmp_path / "nothing")
        with pytest.raises(CheckpointNotFoundError, match="not a folder"):
            Checkpoint.open("./nothing")

    @pytest.mark.parametrize("name", ["someone/some-model", "not a model!", "a/b/c/d"])
    def test_a_hub_id_that_cannot_be_had(self, name: str) -> None:
        with pytest.raises(CheckpointNotFoundError, match="neither a folder nor a hub id"):
            Checkpoint.open(name)

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"model_type": "gpt_neox"}, "supported: llama, mistral, qwen2, qwen3"),
            ({"model_type": None}, "names no model_type"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
            ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0}}, "spiral"),
            ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
            ({"num_key_value_heads": 3}, "3 KV heads"),
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized .*gptq"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
            ({"num_hidden_layers": "many"}, "refused by transformers"),
            ({"num_attention_heads": 0}, "config"),
            ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ],
    )
    def test_settings_that_cannot_be_run(self, folder: Path, fields: dict[str, Any], match: str) -> None:
        edit_config(folder, **fields)
        with pytest.raises((UnsupportedModelError, CorruptCheckpointError), match=match):
            Checkpoint.open(folder)

    def test_layer_types_that_are_not_known(self, tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "model")
        edit_config(folder, layer_types=["full_attention", "linear_attention", "full_attention"])
        with pytest.raises(UnsupportedModelError, match="layer_types"):
            Checkpoint.open(folder)


class TestFiles:
    def test_a_config_that_is_not_json(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "lla')
        with pytest.raises(CorruptCheckpointError, match=r"config\.json"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("keep", [0, 7, 300, -1])
    def test_a_truncated_file(self, folder: Path, keep: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
            Checkpoint.open(folder)

    def test_a_header_that_makes_no_sense(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[20:40] = b"\xff" * 20
        path.write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
            Checkpoint.open(folder)

    def test_no_weights_or_only_pickled_ones(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointNotFoundError, match=r"neither model\.safetensors nor"):
            Checkpoint.open(folder)
        (folder / "pytorch_model.bin").write_bytes(b"never read")
        with pytest.raises(CheckpointNotFoundError, match=r"convert the \.bin"):
            Checkpoint.open(folder)

    def test_an_index_whose_file_is_missing(self, sharded: Path) -> None:
        victim = sorted(sharded.glob("model-*.safetensors"))[1]
        victim.unlink()
        with pytest.raises(CorruptCheckpointError, match=victim.name):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize(
        ("index", "match"),
        [
            ("[]", "not a JSON object"),
            ('{"weight_map": {}}', "no weight_map"),
            ('{"weight_map": {"a": "../../../etc/passwd"}}', "outside its folder"),
        ],
    )
    def test_an_index_that_makes_no_sense(self, sharded: Path, index: str, match: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CorruptCheckpointError, match=match):
            Checkpoint.open(sharded)

    def test_a_weight_in_two_files(self, sharded: Path) -> None:
        first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
        shutil.copyfile(first, second)
        with pytest.raises(CorruptCheckpointError, match="is in"):
            Checkpoint.open(sharded)


class TestWeights:
    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
    def test_the_weights_of_every_family_fit_their_config(self, tiny_checkpoint: MakeCheckpoint, family: str) -> None:
        check_weights(Checkpoint.open(tiny_checkpoint(family)))

    def test_missing(self, folder: Path) -> None:
        edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(WeightMismatchError, match=r"missing .*layers\.1\.mlp\.up_proj\.weight"):
            check_weights(Checkpoint.open(folder))

    def test_left_over(self, folder: Path) -> None:
        def add(weights: dict[str, torch.Tensor]) -> None:
            weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)

        edit_weights(folder, add)
        with pytest.raises(WeightMismatchError, match=r"not in the model: .*q_proj\.bias"):
            check_weights(Checkpoint.open(folder))

    def test_of_another_shape(self, folder: Path) -> None:
        edit_config(folder, intermediate_size=96)
        with pytest.raises(WeightMismatchError, match=r"gate_proj\.weight is \[80, 48\], not \[96, 48\].*more"):
            check_weights(Checkpoint.open(folder))

    def test_of_a_dtype_that_needs_more_than_a_cast(self, folder: Path) -> None:
        def code(weights: dict[str, torch.Tensor]) -> None:
            name = "model.layers.0.mlp.up_proj.weight"
            weights[name] = weights[name].to(torch.float8_e4m3fn)

        edit_weights(folder, code)
        with pytest.raises(WeightMismatchError, match="F8_E4M3"):
            check_weights(Checkpoint.open(folder))

    def test_what_old_checkpoints_carry_along_is_no_error(
        self, folder: Path, tiny_checkpoint: MakeCheckpoint, tmp_path: Path
    ) -> None:
        def add(weights: dict[str, torch.Tensor]) -> None:
            weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

        edit_weights(folder, add)
        check_weights(Checkpoint.open(folder))
        tied = shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "tied")
        edit_weights(tied, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
        check_weights(Checkpoint.open(tied))


class TestDigest:
    def test_it_follows_the_content_and_not_the_place(self, folder: Path, tmp_path: Path) -> None:
        digest = Checkpoint.open(folder).digest()
        assert len(digest) == 32
        assert Checkpoint.open(shutil.copytree(folder, tmp_path / "elsewhere")).digest() == digest

    def test_one_flipped_bit_of_one_weight_changes_it(self, folder: Path) -> None:
        digest = Checkpoint.open(folder).digest()
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        for place in (len(content) - 1, len(content) // 2):
            content[place] ^= 1
            path.write_bytes(content)
            assert Checkpoint.open(folder).digest() != digest
            content[place] ^= 1
        path.write_bytes(content)
        assert Checkpoint.open(folder).digest() == digest

    def test_another_model_of_the_same_shape_and_size_has_another(
        self, tiny_checkpoint: MakeCheckpoint, folder: Path
    ) -> None:
        other = tiny_checkpoint("llama", seed=1)
        size = (folder / "model.safetensors").stat().st_size
        assert (other / "model.safetensors").stat().st_size == size
        assert Checkpoint.open(other).digest() != Checkpoint.open(folder).digest()

    def test_a_setting_that_changes_the_computation_changes_it(self, folder: Path) -> None:
        digest = Checkpoint.open(folder).digest()
        edit_config(folder, rms_norm_eps=1e-3)
        assert Checkpoint.open(folder).digest() != digest

    def test_files_of_many_pieces(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("spillway.node_agent.checkpoint._DIGEST_CHUNK_BYTES", 1000)
        digest = Checkpoint.open(folder).digest()
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1001], content[-1] = content[-1], content[-1001]
        path.write_bytes(content)
        assert Checkpoint.open(folder).digest() != digest


def test_the_spec_counts_what_transformers_counts(tiny_checkpoint: MakeCheckpoint) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
    ]
    for family, overrides in cases:
        spec = Checkpoint.open(tiny_checkpoint(family, **overrides)).spec
        assert spec.weight_count() == sum(p.numel() for p in make_model(family, **overrides).parameters())
        assert spec.kv_bytes_per_token(4) == 2 * 3 * 2 * spec.head_dim * 4


def test_the_positions_digest_names_frequencies_and_windows(tiny_checkpoint: MakeCheckpoint) -> None:
    plain = Checkpoint.open(tiny_checkpoint("mistral")).spec.positions_digest()
    windowed = Checkpoint.open(tiny_checkpoint("mistral", sliding_window=10)).spec.positions_digest()
    theta = {"rope_type": "default", "rope_theta": 9999.0}
    turned = Checkpoint.open(tiny_checkpoint("mistral", rope_parameters=theta)).spec.positions_digest()
    assert len({plain, windowed, turned}) == 3

"""`kto-ds plan`: parameters of published models to the integer, memory by hand, and the command line with nothing but a config.json."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from kto_ds import cli
from kto_ds.errors import UserError
from kto_ds.model.memory import Load, peak_memory
from kto_ds.model.sizes import LayerWidths, ModelSizes
from kto_ds.model.states import Zero, checkpoint_bytes, offloaded_parameters, read_zero, require_partial_offload, require_room, state_bytes
from kto_ds.runtime.deepspeed_config import check_zero_section, find_deepspeed_config, read_deepspeed_config
from kto_ds.runtime.zero_keys import require_world
from tests.distributed.runs import ROOT, conversation, number_tokenizer, write_config, write_rows

# What the models' own config.json say of their shape.
PUBLISHED = {
    "Qwen3-32B": {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 40_960,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False, "max_position_embeddings": 40_960,
    },
    "Llama-3.3-70B": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 131_072,
    },
    "Qwen2.5-14B": {
        "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 131_072, "use_sliding_window": False,
    },
}  # fmt: skip
TOTALS = {"Qwen3-32B": 32_762_123_264, "Qwen3-30B-A3B": 30_532_122_624, "Llama-3.3-70B": 70_553_706_496, "Qwen2.5-14B": 14_770_033_664}


def by_hand(shape: dict, experts: int) -> int:
    """Count a model's parameters from its architecture alone, with so many experts in each layer."""
    hidden, heads, key_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    head_size = shape.get("head_dim", hidden // heads)
    query, key = heads * head_size, key_heads * head_size
    layer = 2 * hidden + 2 * hidden * query + 2 * hidden * key  # two norms; queries and output, keys and values
    if shape["model_type"].startswith("qwen3"):
        layer += 2 * head_size  # norms of queries and keys
    if shape["model_type"] == "qwen2":
        layer += query + 2 * key  # biases
    if "num_experts" in shape:
        layer += hidden * shape["num_experts"] + experts * 3 * hidden * shape["moe_intermediate_size"]  # router, experts
    else:
        layer += 3 * hidden * shape["intermediate_size"]
    return 2 * shape["vocab_size"] * hidden + shape["num_hidden_layers"] * layer + hidden


def write_run(folder: Path, shape: dict, **sections) -> Path:
    """A run whose model is a config.json and nothing else."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(shape))
    batch = {"global_batch_size": 128, **sections.pop("batch", {})}
    return write_config(
        folder / "run.yaml", output_dir=str(folder / "run"), model={"path": str(folder / "model")}, data={"train": [{"path": "rows.jsonl"}]}, batch=batch, **sections
    )


def planned(capsys, run: Path, *options: str) -> dict:
    assert cli.run(["plan", "--config", str(run), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models_are_exact(tmp_path, capsys, name):
    shape = PUBLISHED[name]
    plan = planned(capsys, write_run(tmp_path, shape))
    assert plan["model"]["parameters"] == by_hand(shape, shape.get("num_experts", 1)) == TOTALS[name]
    assert plan["model"]["active"] == by_hand(shape, shape.get("num_experts_per_tok", 1))
    assert plan["model"]["embedding"] == plan["model"]["head"] == shape["vocab_size"] * shape["hidden_size"]
    assert [entry["num_gpus"] for entry in plan["gpus"]] == [8, 16, 32, 64]
    assert plan["disk"]["export"] == 2 * TOTALS[name] and plan["disk"]["checkpoint"] == 12 * TOTALS[name] and plan["disk"]["checkpoints"] == 4 * 12 * TOTALS[name]
    for entry in plan["gpus"]:
        memory, num_gpus = entry["memory_bytes"], entry["num_gpus"]
        assert sum(memory.values()) == entry["total_bytes"]
        # 2 bytes of weights, 4 of gradients, 12 of master weights and moments, cut by parameters; small ones stand on every rank.
        assert memory["weights"] + memory["gradients"] + memory["optimizer"] == pytest.approx(18 * TOTALS[name] / num_gpus, rel=0.002)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run.yaml"]  # a question writes nothing


def test_memory_of_32_billion_beside_the_estimate_that_it_was_planned_with(tmp_path, capsys):
    # GB of a GPU at 8,192 tokens by 8, 16, 32, 64 GPUs, with gradients in bfloat16 (2 bytes a parameter less) and no copies in the head.
    estimates = {8: 84, 16: 51, 32: 35, 64: 27}
    plan = planned(capsys, write_run(tmp_path, PUBLISHED["Qwen3-32B"]))
    for entry in plan["gpus"]:
        gradients = 2 * TOTALS["Qwen3-32B"] / entry["num_gpus"]
        assert (entry["total_bytes"] - gradients) / 1e9 == pytest.approx(estimates[entry["num_gpus"]], rel=0.015)
    assert [entry["fits"] for entry in plan["gpus"]] == [False, True, True, True]
    assert plan["gpus"][0]["smallest_config"] == "zero3_h100x8" and plan["gpus"][1]["smallest_config"] == "zero3"
    assert any(warning.startswith("8 x H100: zero3 needs") for warning in plan["warnings"])


def test_weights_of_four_bits_are_counted_as_they_lie(tmp_path, capsys):
    shape, options = PUBLISHED["Qwen3-32B"], ["--model.lora.r", "16", "--num_gpus", "8"]
    run = write_run(tmp_path, shape)
    adapted, packed = (planned(capsys, run, *options, *more)["gpus"][0] for more in ([], ["--model.load_in_4bit", "true"]))
    hidden, query, key, inner = 5120, 64 * 128, 8 * 128, 25_600
    matrices = 64 * (2 * hidden * query + 2 * hidden * key + 3 * hidden * inner)
    # Half a byte for two, cut among the ranks; on each of them all scales, 0.016 bytes a weight, and a matrix that is whole while it is multiplied with.
    saved = 2 * matrices / 8 - (matrices / 2 / 8 + 0.016 * matrices + 2 * hidden * inner)
    assert adapted["memory_bytes"]["weights"] - packed["memory_bytes"]["weights"] == pytest.approx(saved, rel=1e-3)
    assert adapted["memory_bytes"]["optimizer"] == packed["memory_bytes"]["optimizer"]
    # Every rank reads all of it before it is cut, which on many small GPUs takes more than the run.
    small = planned(capsys, run, *options, "--model.load_in_4bit", "true", "--batch.max_tokens_per_microbatch", "1024", "--data.max_length", "1024", "--gpu", "L40S", "--num_gpus", "64")
    read = matrices / 2 + 2 * (2 * 151_936 * hidden + small["model"]["trainable"])
    assert small["gpus"][0]["highest_moment"] == "reading the weights" and small["gpus"][0]["total_bytes"] == pytest.approx(read, rel=1e-3)


def test_a_run_that_cannot_fit_is_refused_with_what_would(tmp_path, capsys):
    run = write_run(tmp_path, PUBLISHED["Llama-3.3-70B"])
    assert cli.run(["plan", "--config", str(run), "--gpu", "h100", "--num_gpus", "8"]) == 2
    printed = capsys.readouterr()
    assert "70,553,706,496 parameters need" in printed.err and "set deepspeed.config: zero3_offload" in printed.err and "Traceback" not in printed.err
    assert "master weights and moments" in printed.out  # the table is there all the same
    assert cli.run(["plan", "--config", str(run), "--gpu", "H101"]) == 2
    assert "--gpu" in capsys.readouterr().err


def test_a_picture_is_drawn_where_one_is_asked_for(tmp_path):
    run, png = write_run(tmp_path, PUBLISHED["Qwen2.5-14B"]), tmp_path / "plan.png"
    assert cli.run(["plan", "--config", str(run), "--plot", str(png)]) == 0
    picture = imread(png)[..., :3]
    assert picture.shape[0] > 400 and len({tuple(pixel) for pixel in picture.reshape(-1, 3)[::97].round(2).tolist()}) > 8
    assert not (tmp_path / "run").exists()


def test_no_figure_is_cut_off_on_a_terminal_of_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["plan", "--config", str(write_run(tmp_path, PUBLISHED["Qwen3-30B-A3B"]))]) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = planned(capsys, tmp_path / "run.yaml")
    assert [line.split() for line in lines if line.startswith("GPUs")] == 2 * [["GPUs", "8", "16", "32", "64"]]
    [totals] = [line.split()[1:] for line in lines if line.startswith("all ")]
    assert totals == [f"{entry['total_bytes'] / 2**30:.1f}" for entry in plan["gpus"]]
    assert not any("…" in line for line in lines)


def test_a_prepared_dataset_gives_lengths_and_steps(tmp_path, capsys):
    shape = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    run = write_run(tmp_path, {**shape, "max_position_embeddings": 64}, batch={"global_batch_size": 8, "max_tokens_per_microbatch": 64}, deepspeed={"config": "zero2"})
    rows = [conversation([3 + number], list(range(4, 14 + number)), number % 2 == 0) for number in range(32)]
    write_rows(tmp_path / "rows.jsonl", rows)
    number_tokenizer(61).save_pretrained(tmp_path / "model")
    options = ["--data.train", json.dumps([{"path": str(tmp_path / "rows.jsonl")}]), "--data.max_length", "64"]
    assert planned(capsys, run, *options)["work"]["from_dataset"] is False
    assert cli.run(["prepare", "--config", str(run), *options]) == 0
    capsys.readouterr()
    plan = planned(capsys, run, *options, "--num_gpus", "16", "--gpu", "B200")
    assert plan["work"]["from_dataset"] and plan["work"]["num_examples"] == 32 and plan["work"]["num_steps"] == 4
    tokens = sum(1 + len(range(4, 14 + number)) for number in range(32))
    assert plan["work"]["step_tokens"] == pytest.approx(tokens / 4) and plan["work"]["longest_pair"] == 1 + 41
    assert 0 < plan["gpus"][0]["hours"][0] < plan["gpus"][0]["hours"][1]
    assert any("distinct prompts" in warning for warning in plan["warnings"])  # 8 for 16 ranks
    assert plan["disk"]["dataset"] > 0


# memory


TINY = ModelSizes((1000, 64, 640, 640, 64, 1000), (1000, 64, 640, 640, 64, 1000), (704, 704), 1000, 1000, False, True, 3408, 100, LayerWidths(10, 20, 10, 30, False))


def test_states_are_what_deepspeed_allocates_in_each_stage():
    total = 3408
    assert sum(state_bytes(TINY, Zero(0), 2, 4)) == (2 + 2 + 12) * total  # gradients in bfloat16
    assert sum(state_bytes(TINY, Zero(0), 4, 4)) == (4 + 4 + 8) * total  # weights are their own masters
    assert sum(state_bytes(TINY, Zero(1), 2, 4)) == 6 * total + 12 * total // 4
    assert sum(state_bytes(TINY, Zero(2), 2, 4)) == 2 * total + 16 * total // 4
    assert sum(state_bytes(TINY, Zero(3, persistent_below=0), 2, 4)) == 18 * total // 4
    assert sum(state_bytes(TINY, Zero(3, persistent_below=64), 2, 4)) == 18 * total // 4 + 2 * 128
    assert sum(state_bytes(TINY, Zero(3, persistent_below=0), 2, 3)) == 18 * sum(math.ceil(numel / 3) for numel in TINY.parameters)
    assert state_bytes(TINY, Zero(3, persistent_below=0, secondary_ranks=2), 2, 4).weights == 2 * total // 4 + 2 * total // 2


def test_a_part_of_the_optimizer_stays_by_whole_sub_groups():
    zero = Zero(3, persistent_below=0, sub_group=160, offload_share=0.4)
    # Of 4 ranks: 250, 16 + 160, 160, 16 + 250.
    assert offloaded_parameters(TINY, zero, 4) == 4 * (160 + 266)  # int(0.6 * 4) groups stay
    states = state_bytes(TINY, zero, 2, 4)
    assert states.optimizer == 12 * (250 + 176) and states.gradients == 4 * (250 + 176) and states.host == 4 * 852 + 16 * (160 + 266)
    assert state_bytes(TINY, zero._replace(offload_share=1.0), 2, 4)[1:3] == (0, 0)
    with pytest.raises(UserError, match="none would stay"):
        require_partial_offload(TINY, zero._replace(sub_group=10_000), 4)
    require_partial_offload(TINY, zero, 4)


def test_what_could_run_is_not_refused():
    zero = Zero(3, persistent_below=0)
    least = 18 * 3408 // 4 + 2 * 704
    require_room(TINY, zero, 2, 4, least)
    with pytest.raises(UserError, match="at least"):
        require_room(TINY, zero, 2, 4, least - 1)
    load = Load(tokens=1, scored_tokens=1, scoring_tokens=1, weight_bytes=2, checkpoint_every=1)
    assert peak_memory(TINY, zero, load, 4).memory.allocated > least


def test_memory_grows_with_what_is_kept():
    def activations(**changes) -> int:
        load = Load(tokens=1000, scored_tokens=100, scoring_tokens=1000, weight_bytes=2, checkpoint_every=1)._replace(**changes)
        return peak_memory(TINY._replace(layers=(704,) * 8), Zero(3), load, 4).memory.activations

    assert activations() < activations(checkpoint_every=2) < activations(checkpoint_every=0)
    assert activations(offloads_checkpoints=True) < activations() < activations(tokens=2000)
    assert activations(checkpoint_every=0) < activations(checkpoint_every=0, kernels="torch")


def test_frozen_weights_take_no_states_and_no_gradients():
    frozen = TINY._replace(trainable=(64, 64), trains_head=False)  # as adapters leave a model
    assert sum(state_bytes(frozen, Zero(3, persistent_below=0), 2, 4)) == 2 * 3408 // 4 + 16 * 128 // 4
    load = Load(tokens=1000, scored_tokens=1000, scoring_tokens=1000, weight_bytes=2, checkpoint_every=1)
    taken, taken_frozen = (peak_memory(sizes, Zero(3), load, 4).memory.head for sizes in (TINY, frozen))
    assert taken - taken_frozen == (4 + 2) * 1000  # float32 and bfloat16


def test_checkpoints_hold_weights_where_a_rank_has_them_whole():
    assert checkpoint_bytes(TINY, Zero(3), 2) == 12 * 3408
    assert checkpoint_bytes(TINY, Zero(2), 2) == 14 * 3408
    assert checkpoint_bytes(TINY, Zero(0), 4) == 12 * 3408


# DeepSpeed files


CONFIGS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_accepted_and_explained(name):
    raw = read_deepspeed_config(name)
    check_zero_section(raw["zero_optimization"], where=name)
    assert f"`{name}`" in (ROOT / "ds_configs" / "README.md").read_text()
    assert find_deepspeed_config(name).name == f"{name}.json"


CONFLICTS = {
    "zero_optimization.stage3_max_live_parameters": {"stage": 2, "stage3_max_live_parameters": 1},
    "zero_optimization.sub_group_size": {"stage": 1, "sub_group_size": 1},
    "zero_optimization.offload_param": {"stage": 2, "offload_param": {"device": "cpu"}},
    "zero_optimization.zero_hpz_partition_size": {"stage": 2, "zero_hpz_partition_size": 8},
    "zero_optimization.round_robin_gradients": {"stage": 3, "round_robin_gradients": True},
    "zero_optimization.allgather_bucket_size": {"stage": 3, "allgather_bucket_size": 1},
    "zero_optimization.zero_quantized_gradients": {"stage": 3, "zero_quantized_gradients": True},
    "zero_optimization.zero_quantized_weights": {"stage": 3, "zero_quantized_weights": True},
    "zero_optimization.zenflow": {"stage": 2, "zenflow": {"topk_ratio": 0.1}},
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "zero_optimization.allgather_partitions": {"stage": 2, "allgather_partitions": True},
    "zero_optimization.prefetch_bucket_size": {"stage": 3, "prefetch_bucket_size": 1},
    "zero_optimization.cpu_offload": {"stage": 2, "cpu_offload": True},
    "zero_optimization.offload_optimizer:": {"stage": 0, "offload_optimizer": {"device": "cpu"}},
    "zero_optimization.offload_optimizer.pin_memory": {"stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True}},
    "zero_optimization.offload_optimizer.buffer_count": {"stage": 3, "offload_optimizer": {"device": "cpu", "buffer_count": 8}},
    "zero_optimization.offload_optimizer.nvme_path": {"stage": 3, "offload_optimizer": {"device": "nvme"}},
    "zero_optimization.offload_optimizer.ratio": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    "zero_optimization.offload_optimizer.super_offload": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
}


@pytest.mark.parametrize("key", CONFLICTS)
def test_ignored_and_contradicting_keys_are_refused_with_file_key_and_remedy(tmp_path, key):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": CONFLICTS[key]}))
    with pytest.raises(UserError) as refused:
        read_deepspeed_config(str(file))
    assert f"{refused.value.what}:".startswith(key) and refused.value.where == str(file) and refused.value.remedy


@pytest.mark.parametrize("raw, key", [
    ({"zero_optimization": True}, "zero_optimization"), ([], "expected a JSON object"), ({"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
    ({"zero_optimization": {"stage": 3}, "communication_data_type": "bfloat16"}, "communication_data_type"), ({"zero_optimization": {"stage": 3}, "aio": {}}, "aio"),
])  # fmt: skip
def test_top_level_conflicts_are_refused(tmp_path, raw, key):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"(?s){key}.*remedy"):
        read_deepspeed_config(str(file))


def test_an_unknown_nested_key_is_refused_by_name():
    with pytest.raises(UserError, match=r"zero_optimization\.offload_optimizer\.pin_memroy"):
        check_zero_section({"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memroy": True}}, where="ds.json")


def test_a_second_copy_of_the_weights_needs_whole_nodes():
    raw = read_deepspeed_config("zero3_hpz")
    require_world(raw, 16, where="zero3_hpz")
    for num_ranks in (8, 12):
        with pytest.raises(UserError, match="zero_hpz_partition_size = 8"):
            require_world(raw, num_ranks, where="zero3_hpz")
    assert read_zero(raw).secondary_ranks == 8 and read_zero(read_deepspeed_config("zero3_h100x8")).offload_share > 0

"""Assembly: a model made of public parts computes what the parts compute on their own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from flashvl.data.tokenizer import train_tokenizer
from flashvl.errors import CheckpointError, ConfigError
from flashvl.model.loading import load_model, load_processor
from flashvl.model.parts.assembly import assemble

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
LLM = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
"""Control tokens of Llama 3.2's tokenizer, in which their ids begin at 128000."""


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like the base model's: with a BOS, and without a pad token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in LLAMA_TOKENS])
    bos = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers and LLMs as transformers saves them, with random weights."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    whole = SiglipConfig(text_config=text, vision_config=TOWER)
    SiglipModel(whole).save_pretrained(folder / "siglip")
    SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(folder / "siglip_vision_model")
    Aimv2VisionModel(Aimv2VisionConfig(**TOWER)).save_pretrained(folder / "aimv2_vision_model")
    for name, is_tied in (("qwen", False), ("qwen_tied", True)):
        config = Qwen2Config(**LLM, tie_word_embeddings=is_tied)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer = train_tokenizer(["a red circle"], 270)
        tokenizer.eos_token = "<|endoftext|>"  # like the base model's
        tokenizer.save_pretrained(folder / name)
    LlamaForCausalLM(LlamaConfig(**LLM, tie_word_embeddings=True)).save_pretrained(folder / "llama")
    llama_tokenizer().save_pretrained(folder / "llama")
    return folder


def write_apple_layout(folder: Path, output: Path) -> Path:
    """An AIMv2 in transformers' layout -> one in Apple's, without its pooling head."""
    stored = load_file(folder / "model.safetensors")
    weights = {
        "preprocessor.patchifier.proj.weight": stored["embeddings.patch_embed.weight"],
        "preprocessor.patchifier.proj.bias": stored["embeddings.patch_embed.bias"],
        "preprocessor.patchifier.norm.weight": stored["embeddings.rms_norm.weight"],
        "preprocessor.pos_embed": stored["embeddings.position_embedding.weight"][None],
        "trunk.post_trunk_norm.weight": stored["rms_norm.weight"],
    }
    for number in range(TOWER["num_hidden_layers"]):
        ours, theirs = f"encoder.layers.{number}.", f"trunk.blocks.{number}."
        qkv = [stored[f"{ours}attention.{part}_proj.weight"] for part in "qkv"]
        weights |= {
            f"{theirs}attn.qkv.weight": torch.cat(qkv),
            f"{theirs}attn.proj.weight": stored[f"{ours}attention.out_proj.weight"],
            f"{theirs}norm_1.weight": stored[f"{ours}rms_norm1.weight"],
            f"{theirs}norm_2.weight": stored[f"{ours}rms_norm2.weight"],
            f"{theirs}mlp.fc1.weight": stored[f"{ours}ffn.gate_proj.weight"],
            f"{theirs}mlp.fc2.weight": stored[f"{ours}ffn.down_proj.weight"],
            f"{theirs}mlp.fc3.weight": stored[f"{ours}ffn.up_proj.weight"],
        }
    output.mkdir()
    save_file(weights, output / "model.safetensors")
    config = TOWER | {"model_type": "aimv2", "auto_map": {"AutoModel": "modeling_aimv2.AIMv2Model"}}
    (output / "config.json").write_text(json.dumps(config))
    return output


def make(parts: Path, output: Path, vision: str = "siglip", llm: str = "qwen", **options: Any):
    assemble(parts / vision, parts / llm, output, projector_hidden_size=20, **options)
    return load_model(output), load_processor(output)


@pytest.mark.parametrize("vision", ["siglip", "siglip_vision_model", "aimv2_vision_model", "apple"])
def test_the_tower_is_its_own(
    parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], vision: str
) -> None:
    alone_class = SiglipVisionModel if vision.startswith("siglip") else Aimv2VisionModel
    folder = parts / ("aimv2_vision_model" if vision == "apple" else vision)
    alone = alone_class.from_pretrained(folder)
    if vision == "apple":
        write_apple_layout(folder, tmp_path / "apple")
        vision = str(tmp_path / "apple")
    capfd.readouterr()
    model, processor = make(parts, tmp_path / "out", vision)
    assert "LOAD REPORT" not in capfd.readouterr().err

    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model.get_image_features(pixels)
        expected = alone.eval()(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(ours.last_hidden_state, expected, atol=1e-6, rtol=1e-6)
    assert not any(".head." in name for name in model.state_dict())
    assert ours.pooler_output.shape == (2, 16, LLM["hidden_size"])
    is_siglip = alone_class is SiglipVisionModel
    expected_mean = 0.5 if is_siglip else 0.48145466
    assert processor.image_processor.image_mean[0] == pytest.approx(expected_mean)


@pytest.mark.parametrize("llm", ["qwen", "qwen_tied", "llama"])
def test_the_llm_is_its_own(parts: Path, tmp_path: Path, llm: str) -> None:
    model, _ = make(parts, tmp_path / "out", llm=llm)
    alone = AutoModelForCausalLM.from_pretrained(parts / llm, dtype=torch.float32)
    input_ids = torch.tensor([[7, 30, 200, 41]])
    with torch.no_grad():
        ours = model(input_ids=input_ids).logits
        expected = alone.eval()(input_ids=input_ids).logits
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (llm == "qwen")


def test_weights_stay_as_stored_and_the_adapter_is_like_the_llm(
    parts: Path, tmp_path: Path
) -> None:
    make(parts, tmp_path / "out")
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        dtypes.setdefault(name.split(".")[1], set()).add(weight.dtype)
    assert dtypes["vision_tower"] == {torch.float32}
    assert dtypes["language_model"] == dtypes["multi_modal_projector"] == {torch.bfloat16}


def test_the_seed_makes_the_adapter(parts: Path, tmp_path: Path) -> None:
    name = "model.multi_modal_projector.linear_1.weight"
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        make(parts, tmp_path / str(number), seed=seed)
        drawn.append(load_file(tmp_path / str(number) / "model.safetensors")[name])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].float().std() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("tiling", "options", "tokens"),
    [
        ("static", None, 16),
        ("dynamic", {"mode": "dynamic"}, 16),
        ("overlap", {"mode": "overlap", "margin": 4}, 16),
        ("iss", {"mode": "iss", "margin": 4}, 36),
    ],
)
def test_every_tiling(parts: Path, tmp_path: Path, tiling: Any, options: Any, tokens: int) -> None:
    model, processor = make(parts, tmp_path / "out", tiling=tiling)
    assert model.config.tiling == options
    assert processor.image_seq_length == tokens
    assert model.get_image_features(torch.randn(1, 3, 32, 32)).pooler_output.shape[1] == tokens


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "A dog."},
]


def test_the_chat_of_qwen(parts: Path, tmp_path: Path) -> None:
    model, processor = make(parts, tmp_path / "out")
    assert model.config.image_token_id == processor.image_token_id == 3
    assert processor.tokenizer.eos_token == "<|im_end|>"
    text = processor.apply_chat_template(CHAT, tokenize=False)
    assert text.endswith("<|im_start|>assistant\nA dog.<|im_end|>\n")


def test_the_chat_of_llama(parts: Path, tmp_path: Path) -> None:
    model, processor = make(parts, tmp_path / "out", llm="llama")
    tokenizer = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")
    assert model.config.image_token_id == processor.image_token_id == image_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|eot_id|>", "<|finetune_right_pad_id|>")
    expected = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
        "<|reserved_special_token_0|>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    prompt = processor.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == expected
    assert processor.apply_chat_template(CHAT, tokenize=False) == f"{expected}A dog.<|eot_id|>"
    text_only = [{"role": "user", "content": "What?"}, CHAT[1]]
    encoded = tokenizer.apply_chat_template(
        text_only,
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = torch.tensor(encoded["input_ids"])
    assert int((ids == tokenizer.bos_token_id).sum()) == 1
    answer = ids[torch.tensor(encoded["assistant_masks"]).bool()]
    assert tokenizer.decode(answer) == "A dog.<|eot_id|>"


@pytest.mark.parametrize(("llm", "end"), [("qwen", "<|im_end|>"), ("llama", "<|eot_id|>")])
def test_answers_end_as_the_template_says_or_as_the_llms_own(
    parts: Path, tmp_path: Path, llm: str, end: str
) -> None:
    source = Path(shutil.copytree(parts / llm, tmp_path / llm))
    stored = {"eos_token_id": [7, 9], "pad_token_id": 11, "do_sample": True, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(stored))
    model, processor = make(parts, tmp_path / "out", llm=str(source))
    config = model.generation_config
    end_token = processor.tokenizer.convert_tokens_to_ids(end)
    assert (config.eos_token_id, config.pad_token_id) == ([end_token, 7, 9], 11)
    assert (config.do_sample, config.temperature) == (None, None)
    assert processor.tokenizer.padding_side == "left"

    (source / "generation_config.json").unlink()
    model, processor = make(parts, tmp_path / "without", llm=str(source))
    assert model.generation_config.eos_token_id[0] == end_token
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_the_settings_of_the_tower_are_kept(parts: Path, tmp_path: Path) -> None:
    vision = Path(shutil.copytree(parts / "siglip", tmp_path / "siglip"))
    settings = {"size": {"shortest_edge": 32}, "image_std": [0.1, 0.2, 0.3]}
    (vision / "preprocessor_config.json").write_text(json.dumps(settings))
    _, processor = make(parts, tmp_path / "out", str(vision))
    assert list(processor.image_processor.image_std) == [0.1, 0.2, 0.3]


def test_an_odd_grid_is_refused_but_for_iss(parts: Path, tmp_path: Path) -> None:
    odd = SiglipVisionConfig(**(TOWER | {"image_size": 28}))
    SiglipVisionModel(odd).save_pretrained(tmp_path / "odd")
    with pytest.raises(ConfigError, match="a grid of 7x7 patches"):
        assemble(tmp_path / "odd", parts / "qwen", tmp_path / "out")
    make(parts, tmp_path / "out", str(tmp_path / "odd"), tiling="iss")


def test_a_part_of_another_kind_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a 'qwen2' model, not a vision tower"):
        assemble(parts / "qwen", parts / "qwen", tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds a 'siglip' model, not a supported LLM"):
        assemble(parts / "siglip", parts / "siglip", tmp_path / "out")


def test_a_tower_that_lacks_a_weight_is_refused(parts: Path, tmp_path: Path) -> None:
    vision = Path(shutil.copytree(parts / "aimv2_vision_model", tmp_path / "tower"))
    weights = {key: value.clone() for key, value in load_file(vision / "model.safetensors").items()}
    del weights["rms_norm.weight"]
    save_file(weights, vision / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks the weight rms_norm.weight"):
        assemble(vision, parts / "qwen", tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "name", "values", "reason"),
    [
        ("siglip_vision_model", "config.json", {"num_attention_heads": 3}, "divisible"),
        ("siglip_vision_model", "config.json", {"hidden_size": "wide"}, "hidden_size 'wide'"),
        ("siglip_vision_model", "config.json", {"num_hidden_layers": 10**9}, "1 to 1000"),
        ("siglip_vision_model", "config.json", {"hidden_act": "nonesuch"}, "nonesuch"),
        ("siglip", "config.json", {"vision_config": 3}, "is not usable"),
        ("aimv2_vision_model", "config.json", {"patch_size": 0}, "patch_size 0"),
        ("qwen", "config.json", {"num_attention_heads": -4}, "num_attention_heads -4"),
        (
            "qwen",
            "config.json",
            {"num_attention_heads": 5},
            "k_proj.bias has shape (12,), not (8,)",
        ),
        ("qwen", "config.json", {"layer_types": ["nonesuch"]}, "cannot be loaded"),
        ("llama", "config.json", {"rope_parameters": 3}, "cannot be loaded"),
        ("siglip", "preprocessor_config.json", {"image_std": [0, 1, 1]}, "above zero"),
        ("siglip", "preprocessor_config.json", {"image_mean": 0.5}, "image_mean=0.5"),
        ("siglip", "preprocessor_config.json", {"resample": 77}, "resample=77"),
        ("qwen", "generation_config.json", {"eos_token_id": 300}, "token 300, but"),
        ("qwen", "tokenizer_config.json", {"model_max_length": "long"}, "no usable tokenizer"),
    ],
)
def test_a_part_with_an_impossible_setting_is_refused_in_one_line(
    parts: Path, tmp_path: Path, part: str, name: str, values: dict[str, Any], reason: str
) -> None:
    folder = Path(shutil.copytree(parts / part, tmp_path / "broken"))
    before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(before | values))
    is_llm = part in ("qwen", "llama")
    with pytest.raises(CheckpointError) as caught:
        assemble(
            parts / "siglip" if is_llm else folder,
            folder if is_llm else parts / "qwen",
            tmp_path / "out",
        )
    message = str(caught.value)
    assert reason in message
    assert str(folder) in message and message.isprintable()
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_the_placeholder_is_refused(parts: Path, tmp_path: Path) -> None:
    llm = Path(shutil.copytree(parts / "llama", tmp_path / "llama"))
    train_tokenizer(["a"], 262).save_pretrained(llm)
    with pytest.raises(CheckpointError, match=r"no <\|reserved_special_token_0\|>"):
        assemble(parts / "siglip", llm, tmp_path / "out")


def test_an_assembly_obeys_the_umask(
    parts: Path, tmp_path: Path, assert_obeys_umask: Callable[[Path], None]
) -> None:
    make(parts, tmp_path / "made" / "out")
    assert_obeys_umask(tmp_path / "made")


def test_an_existing_output_is_left_alone(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        assemble(parts / "siglip", parts / "qwen", tmp_path)

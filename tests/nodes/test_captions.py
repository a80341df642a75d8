"""Captions in Pick Reference: the node and transformers agree on a tiny random BLIP-2, and every refusal."""

import json
import shutil
import sys
from types import ModuleType

import comfy.model_management
import folder_paths
import pytest
import torch
from concept_atelier.nodes.native import captions
from concept_atelier.nodes.native.pictures import to_pil
from concept_atelier.nodes.pick_reference import AtelierPickReference
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

SPECIAL = ["<pad>", "</s>", "<unk>", "<image>"]
WORDS = [f"word{number}\n" for number in range(60)]  # each with the line break that a caption may not contain
QUERIES = 3

pytestmark = pytest.mark.usefixtures("inference_mode")


def write_blip2(folder, text_config):
    """A BLIP-2 of random weights, large enough that the caption depends on the picture, and its tiny tokenizer."""
    vision = Blip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    qformer = Blip2QFormerConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
        cross_attention_frequency=1,
        encoder_hidden_size=16,
    )
    parts = {"vision_config": vision, "qformer_config": qformer, "text_config": text_config}
    if int(transformers_version()) < 5:
        parts = {key: config.to_dict() for key, config in parts.items()}
    config = Blip2Config(**parts, num_query_tokens=QUERIES, image_token_index=SPECIAL.index("<image>"))
    torch.manual_seed(0)
    network = Blip2ForConditionalGeneration(config).eval()
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            weight.detach().normal_(0, 4.0 if name == "language_projection.weight" else 0.5)
    network.save_pretrained(folder, safe_serialization=True)
    vocabulary = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    images = BlipImageProcessor(size={"height": 8, "width": 8})
    Blip2Processor(images, tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)


def transformers_version():
    import transformers

    return transformers.__version__.split(".")[0]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two folders as they are published: one with OPT, one with T5."""
    home = tmp_path_factory.mktemp("published")
    size = {"vocab_size": len(SPECIAL + WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    opt = OPTConfig(
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        **size,
    )
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **size)
    write_blip2(home / "opt", opt)
    write_blip2(home / "t5", t5)
    return home


@pytest.fixture
def blip2(published, tmp_path, monkeypatch):
    """A models folder with both."""
    folders = {key: ([*paths], set(endings)) for key, (paths, endings) in folder_paths.folder_names_and_paths.items()}
    folders.pop("blip2", None)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    captions.register_folder()
    shutil.copytree(published, tmp_path / "blip2")
    return tmp_path / "blip2"


@pytest.fixture
def pictures():
    return torch.eye(3)[:, None, None].expand(3, 12, 20, 3)


def pick(pictures, index=0, **more):
    inputs = {"by": "index", "dino": "", "index": index, **more}
    output = AtelierPickReference.execute([pictures], **{name: [given] for name, given in inputs.items()})
    return output.args[3], output.ui.value


def directly(folder, picture):
    """What transformers itself writes, words only."""
    processor = Blip2Processor.from_pretrained(folder)
    network = Blip2ForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32)
    tokens = network.generate(**processor(images=to_pil(picture), return_tensors="pt"), max_new_tokens=30)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0]


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_caption_of_the_chosen_picture_is_that_of_transformers_in_one_line(blip2, pictures, kind):
    expected = [directly(blip2 / kind, picture) for picture in pictures]
    assert len(set(expected)) > 1 and all("\n" in text for text in expected)
    for index, text in enumerate(expected):
        caption, shown = pick(pictures, index, caption_model=kind)
        assert caption == " ".join(text.split())
        assert shown == f"Picture {index}, by hand.\nCaption: {caption}"
    assert max(len(text.split()) for text in expected) == 30


def test_without_a_caption_model_the_caption_is_empty(blip2, pictures):
    assert pick(pictures) == ("", "Picture 0, by hand.")


def test_the_transparent_is_captioned_as_white(blip2, pictures):
    alpha = torch.cat([pictures[:1], torch.zeros(1, 12, 20, 1)], dim=-1)
    assert pick(alpha, caption_model="opt")[0] == pick(torch.ones(1, 12, 20, 3), caption_model="opt")[0]


def test_comfyui_loads_the_model_and_may_evict_it(blip2, pictures, monkeypatch):
    loaded = []
    load_models = comfy.model_management.load_models_gpu

    def record(patchers, *args, **more):
        loaded.extend(patchers)
        load_models(patchers, *args, **more)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", record)
    pick(pictures, caption_model="opt")
    assert [type(patcher.model) for patcher in loaded] == [captions.Captioner]
    assert loaded[0].model_size() > 0


def test_it_computes_in_half_precision_where_comfyui_does(blip2, pictures, monkeypatch):
    assert captions.load_captioner("opt").network.vision_model.dtype == torch.float32
    monkeypatch.setattr(comfy.model_management, "should_use_fp16", lambda device: True)
    captioner = captions.load_captioner("opt")
    assert captioner.network.vision_model.dtype == captioner.network.language_model.dtype == torch.float16
    caption, _ = pick(pictures, caption_model="opt")
    assert caption.startswith("word")


def test_the_folders_of_models_are_offered(blip2):
    def offered():
        (given,) = [given for given in AtelierPickReference.define_schema().inputs if given.id == "caption_model"]
        assert given.optional
        return given.options

    assert offered() == ["none", "opt", "t5"]
    (blip2 / "empty").mkdir()
    (blip2 / "deeper").mkdir()
    (blip2 / "t5").rename(blip2 / "deeper" / "t5")
    shutil.copy(blip2 / "opt" / "config.json", blip2)
    assert offered() == ["none", ".", "deeper/t5", "opt"]
    assert captions.check_caption_model("deeper/t5") is True


def test_folders_of_another_pack_are_offered_whatever_files_it_looks_for(blip2, tmp_path):
    folder_paths.folder_names_and_paths["blip2"] = ([str(tmp_path / "other")], {".safetensors"})
    captions.register_folder()
    shutil.copytree(blip2 / "opt", tmp_path / "other" / "theirs")
    assert captions.caption_models() == ["opt", "t5", "theirs"]
    assert captions.check_caption_model("theirs") is True


def refused(name, pattern):
    """Before the node runs and when it does, with the same sentence."""
    message = AtelierPickReference.validate_inputs(["index"], [""], [name])
    assert isinstance(message, str) and "\n" not in message
    with pytest.raises(ValueError, match=pattern) as raised:
        captions.load_captioner(name)
    assert str(raised.value) == message


def test_what_is_missing_in_a_folder_is_named_before_the_node_runs(blip2):
    assert AtelierPickReference.validate_inputs(["index"], [""]) is True
    assert AtelierPickReference.validate_inputs(["index"], [""], ["opt"]) is True
    assert AtelierPickReference.validate_inputs(["index"], [""], (None,)) is True
    refused("gone", r"no folder gone .*Salesforce/blip2-opt-2\.7b into .*blip2/blip2-opt-2\.7b and press R")
    (blip2.parent / "config.json").write_text('{"model_type": "blip-2"}')
    refused("..", r"no folder \.\. ")
    words = blip2 / "opt" / "tokenizer.json"
    words.rename(blip2.parent / words.name)
    refused("opt", r"no vocabulary in .*blip2/opt: put the tokenizer\.json")
    words.with_name("vocab.json").touch()
    assert captions.check_caption_model("opt") is True
    weights = blip2 / "opt" / "model.safetensors"
    weights.rename(blip2.parent / weights.name)
    refused("opt", r"no weights in .*blip2/opt: put the \.safetensors files")
    torch.save({}, blip2 / "opt" / "pytorch_model.bin")
    refused("opt", r"weights in .*blip2/opt are pickled .* never opened: put the \.safetensors")
    (blip2 / "t5" / "config.json").write_text(json.dumps({"model_type": "florence2"}))
    refused("t5", r"blip2/t5 holds no BLIP-2 model")
    for damaged in ("{", "[1]", "{}"):
        (blip2 / "t5" / "config.json").write_text(damaged)
        refused("t5", r"blip2/t5 holds no BLIP-2 model, or its config\.json is damaged")


def test_a_replaced_file_of_the_caption_model_counts_as_a_change(blip2):
    def fingerprint(name):
        return AtelierPickReference.fingerprint_inputs(["index"], [""], [name], pictures=(None,))

    before = [fingerprint(name) for name in ("opt", "t5", "none", None)]
    assert before[0] and before[2] == before[3] == []
    (blip2 / "opt" / "model.safetensors").write_bytes(b"another")
    assert fingerprint("opt") != before[0]
    assert [fingerprint(name) for name in ("t5", "none", None)] == before[1:]


def test_damaged_files_are_named_with_their_folder(blip2):
    weights = blip2 / "opt" / "model.safetensors"
    whole = weights.read_bytes()
    damaged = [whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1\n"]
    for content in damaged:
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"blip2/opt could not be read as a BLIP-2 model \(\w+\): a file"):
            captions.load_captioner("opt")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({**tensors, "query_tokens": torch.zeros(1, 5, 16)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"blip2/opt could not be read"):
        captions.load_captioner("opt")
    tensors.pop("query_tokens")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"blip2/opt is incomplete, it lacks the tensor query_tokens"):
        captions.load_captioner("opt")
    (blip2 / "t5" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"blip2/t5 could not be read"):
        captions.load_captioner("t5")


def test_programs_in_a_folder_are_never_run(blip2, pictures):
    expected, _ = pick(pictures, caption_model="opt")
    marker = blip2 / "marker"
    program = f"open({str(marker)!r}, 'w')\nclass Any: pass\n"
    (blip2 / "opt" / "evil.py").write_text(program)
    for file, entry in (
        ("config.json", {"AutoConfig": "evil.Any", "AutoModel": "evil.Any"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Any", "evil.Any"]}),
        ("processor_config.json", {"AutoProcessor": "evil.Any", "AutoImageProcessor": "evil.Any"}),
    ):
        path = blip2 / "opt" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": entry}))
    assert pick(pictures, caption_model="opt")[0] == expected
    assert not marker.exists()


class Watched(ModuleType):
    """transformers, with a list of what was asked of it."""

    def __init__(self):
        super().__init__("transformers")
        self.real, self.asked = sys.modules["transformers"], []

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self.real, name)


def test_nothing_is_imported_without_a_caption(blip2, pictures, monkeypatch):
    watched = Watched()
    monkeypatch.setitem(sys.modules, "transformers", watched)
    AtelierPickReference.define_schema()
    AtelierPickReference.validate_inputs(["index"], [""], ["opt"])
    pick(pictures, caption_model="none")
    assert not watched.asked
    pick(pictures, caption_model="opt")
    assert "Blip2ForConditionalGeneration" in watched.asked

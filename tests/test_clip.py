"""TextEncoder and the CLIP vision tower, on a tiny random CLIP and (where it is) on MiniLM."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_clip import make_tiny_clip
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from pmpseg.errors import InputError
from pmpseg.models import Prompts, TextEncoder
from pmpseg.models import clip as clip_module
from pmpseg.models.clip import load_clip_vision

PHRASES = ["red circle", "red square", "grass", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder(folder)


def assert_close(a: Prompts, b: Prompts) -> None:
    """Equal where valid, whatever the padding."""
    assert torch.equal(a.valid, b.valid) and torch.equal(a.token_valid.sum(-1), b.token_valid.sum(-1))
    torch.testing.assert_close(a.tokens[a.token_valid], b.tokens[b.token_valid])
    torch.testing.assert_close(a.pooled[a.valid], b.pooled[b.valid])


def reference(folder: Path, text: str) -> torch.Tensor:
    """transformers' own answer (1, D), not normalised."""
    ids = AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt")
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder).get_text_features(**ids).pooler_output


def test_shapes_and_lengths(encoder: TextEncoder):
    prompts = encoder.encode(PHRASES)
    assert encoder.dim == 24
    assert prompts.valid.shape == (1, 4) and prompts.valid.all()
    # "red", "circle", end; "grass", end; "a", "c", "a", "t", end
    assert prompts.token_valid.sum(-1).tolist() == [[3, 3, 2, 5]]
    assert prompts.tokens.shape == (1, 4, 5, 24) and prompts.tokens.dtype == torch.float32
    torch.testing.assert_close(prompts.pooled.norm(dim=-1), torch.ones(1, 4))


def test_is_what_transformers_computes(folder: Path, encoder: TextEncoder):
    wanted = reference(folder, "red circle")
    prompts = encoder.encode(["red circle"])
    torch.testing.assert_close(prompts.pooled[0], F.normalize(wanted, dim=-1))
    torch.testing.assert_close(prompts.tokens[0, :, -1], wanted)  # the end-of-text token, not normalised
    torch.testing.assert_close(TextEncoder(folder, normalize=False).encode(["red circle"]).pooled[0], wanted)


def test_prompts_never_share_an_embedding(encoder: TextEncoder):
    phrases = [*PHRASES, "circle red", "красный", "зелёный", "🙂", "🙃", "red 🙂 square", "red 🙃 square"]
    pooled = encoder.encode(phrases).pooled[0]
    assert (torch.cdist(pooled, pooled) + torch.eye(len(phrases))).min() > 1e-3


def test_a_strange_word_does_not_cut_the_prompt(encoder: TextEncoder):
    """Read by a tokenizer without the bytes, both would end at the emoji and be the same."""
    prompts = encoder.encode(["red 🙂 circle", "red 🙂 square"])
    assert (prompts.token_valid.sum(-1) > 4).all()
    assert (prompts.pooled[0, 0] - prompts.pooled[0, 1]).norm() > 1e-3


def test_batched_is_one_by_one(folder: Path, encoder: TextEncoder):
    together = encoder.encode(PHRASES)
    alone = TextEncoder(folder)
    for i, phrase in enumerate(PHRASES):
        assert_close(together.select([i]), alone.encode([phrase]))


def test_order_and_padding_do_not_matter(encoder: TextEncoder, folder: Path):
    wanted = encoder.encode(PHRASES)
    other = TextEncoder(folder).encode_batch([["", *PHRASES[::-1]], ["grass"], []])
    assert other.valid.tolist() == [[False, True, True, True, True], [True] + [False] * 4, [False] * 5]
    assert not other.token_valid[~other.valid].any()
    assert (other.pooled[~other.valid] == 0).all() and (other.tokens[~other.token_valid] == 0).all()
    row = Prompts(other.tokens[:1], other.token_valid[:1], other.pooled[:1], other.valid[:1])
    assert_close(row.select([4, 3, 2, 1]), wanted)


def test_all_padding(encoder: TextEncoder):
    prompts = encoder.encode_batch([["", ""], [" ", ""]])
    assert prompts.tokens.shape == (2, 2, 1, 24) and not prompts.valid.any() and not prompts.token_valid.any()


def test_cache(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    first = encoder.encode(PHRASES)
    seen = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda texts: seen.extend(texts) or encode(texts))
    second = encoder.encode([*PHRASES, " red circle "])
    assert seen == []
    assert torch.equal(first.tokens, second.tokens[:, :4]) and torch.equal(first.pooled, second.pooled[:, :4])
    encoder.encode_batch([["grass", "sand"], ["sand", ""]])
    assert seen == ["sand"]


def test_cache_is_bounded(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clip_module, "CACHED_PHRASES", 3)
    wanted = encoder.encode(PHRASES)
    assert len(encoder._cache) == 3
    assert_close(encoder.encode(PHRASES), wanted)


def test_cached_in_validation_serves_training(encoder: TextEncoder):
    """Lightning validates first, in inference mode and at its own precision: neither may stick."""
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        encoder.encode(PHRASES)
    pooled = encoder.encode(PHRASES).pooled
    assert pooled.dtype == torch.float32
    torch.nn.Linear(24, 2)(pooled).sum().backward()
    encoder._cache.clear()
    assert torch.equal(encoder.encode(PHRASES).pooled, pooled)


def test_templates_and_synonyms_are_averaged(folder: Path):
    encoder = TextEncoder(folder, templates=("a {}", "my {} here"))
    prompts = encoder.encode([["red", "grass"], "circle"])
    texts = ["a red", "my red here", "a grass", "my grass here"]
    rows = torch.cat([F.normalize(reference(folder, text), dim=-1) for text in texts])
    torch.testing.assert_close(prompts.pooled[0, 0], F.normalize(rows.mean(0), dim=0))
    tokens = TextEncoder(folder).encode(["a red"]).tokens[0, 0]
    torch.testing.assert_close(prompts.tokens[0, 0, : len(tokens)], tokens)
    assert prompts.token_valid[0, 0].sum() == len(tokens)
    assert len(encoder._cache) == 2


def test_saves_what_it_opens(folder: Path, encoder: TextEncoder, tmp_path: Path):
    encoder.save(tmp_path / "text")
    again = TextEncoder(tmp_path / "text")
    assert_close(again.encode(PHRASES), encoder.encode(PHRASES))
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert config["model_type"] == "clip_text_model"
    size = sum(file.stat().st_size for file in (tmp_path / "text").iterdir())
    assert size < sum(file.stat().st_size for file in folder.iterdir())


def test_frozen_and_always_evaluating(encoder: TextEncoder):
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training and not encoder.model.training


def test_half_precision_file_is_computed_in_float32(folder: Path, tmp_path: Path):
    CLIPModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    encoder = TextEncoder(tmp_path)
    assert next(encoder.parameters()).dtype == encoder.encode(["red"]).tokens.dtype == torch.float32


def test_long_prompt_is_cut_with_one_warning(encoder: TextEncoder):
    long = "grass " * 30
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompts = encoder.encode([long, "red"])
        encoder.encode([long])
    assert len(caught) == 1 and "grass grass" in str(caught[0].message)
    assert prompts.token_valid.sum(-1).tolist() == [[15, 2]]
    assert_close(prompts.select([0]), encoder.encode(["grass " * 14]))


def test_eos_of_openai_folders(tmp_path: Path, encoder: TextEncoder):
    """Their text_config says 2, and transformers then takes the highest id."""
    folder = make_tiny_clip(tmp_path, eos_token_id=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        legacy = TextEncoder(folder).encode(PHRASES)
    assert_close(legacy, encoder.encode(PHRASES))
    torch.testing.assert_close(legacy.pooled[0, :1], F.normalize(reference(folder, PHRASES[0]), dim=-1))


def test_wrong_eos_in_the_config_is_mended(tmp_path: Path, encoder: TextEncoder):
    folder = make_tiny_clip(tmp_path / "wrong", eos_token_id=49407)
    torch.testing.assert_close(reference(folder, "red"), reference(folder, "grass"))  # the trap
    with pytest.warns(UserWarning, match="eos_token_id 49407"):
        mended = TextEncoder(folder)
    assert_close(mended.encode(PHRASES), encoder.encode(PHRASES))
    mended.save(tmp_path / "right")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextEncoder(tmp_path / "right")


def test_a_word_that_reads_as_the_end_is_refused(encoder: TextEncoder, tmp_path: Path, folder: Path):
    with pytest.raises(InputError, match="takes for the end of the text"):
        encoder.encode(["red <|endoftext|> circle"])
    shutil.copytree(folder, tmp_path / "poor")
    file = tmp_path / "poor" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    del tokenizer["model"]["vocab"]["z"]  # an unknown symbol reads as the end of the text
    file.write_text(json.dumps(tokenizer))
    poor = TextEncoder(tmp_path / "poor")
    with pytest.raises(InputError, match="zebra"):
        poor.encode(["a zebra here"])


@pytest.mark.parametrize("prompts", [[], "red", ["red", " "], [["red", ""]], [[]]])
def test_bad_prompts_are_refused(encoder: TextEncoder, prompts: object):
    with pytest.raises(InputError, match="wanted a"):
        encoder.encode(prompts)


@pytest.mark.parametrize("prompts", [[], [[], []], ["red", "grass"]])
def test_bad_batches_are_refused(encoder: TextEncoder, prompts: object):
    with pytest.raises(InputError, match="wanted a list of phrases an image"):
        encoder.encode_batch(prompts)


def test_bad_folders_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="cannot open"):
        TextEncoder(tmp_path)
    with pytest.raises(InputError, match="cannot open"):
        load_clip_vision("/nowhere/at/all")
    with pytest.raises(InputError, match="template"):
        TextEncoder(folder, templates=("a photo",))
    shutil.copytree(folder, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="lacks its tokenizer"):
        TextEncoder(tmp_path / "mute")
    shutil.copytree(folder, tmp_path / "short")
    weights = tmp_path / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot open"):
        TextEncoder(tmp_path / "short")


def test_loading_is_quiet(folder: Path, capfd: pytest.CaptureFixture[str]):
    TextEncoder(folder)
    load_clip_vision(folder)
    assert capfd.readouterr() == ("", "")


def test_vision_tower_and_its_normalisation(folder: Path, tmp_path: Path):
    model, normalisation = load_clip_vision(folder)
    assert normalisation == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    wanted = CLIPModel.from_pretrained(folder).vision_model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    assert load_clip_vision(tmp_path / "bare")[1] == {}


def test_sentence_encoder(shared: Callable[..., Path], tmp_path: Path):
    encoder = TextEncoder(shared("weights", "minilm"))
    prompts = encoder.encode(["a cat", "a kitten", "a truck"])
    assert prompts.tokens.shape == (1, 3, 4, 384) and prompts.tokens.dtype == torch.float32
    cat, kitten, truck = prompts.pooled[0]
    assert cat @ kitten > cat @ truck + 0.2
    mean = F.normalize(prompts.tokens[0, 0][prompts.token_valid[0, 0]].mean(0), dim=0)
    torch.testing.assert_close(cat, mean)
    encoder._cache.clear()
    with_longer = encoder.encode(["a cat", "a far longer description of a cat"])
    torch.testing.assert_close(with_longer.pooled[0, 0], cat, atol=1e-5, rtol=0)
    encoder.save(tmp_path)
    torch.testing.assert_close(TextEncoder(tmp_path).encode(["a cat"]).pooled[0, 0], cat, atol=1e-5, rtol=0)

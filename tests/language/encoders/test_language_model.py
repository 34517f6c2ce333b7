"""A language model of transformers as methods get it: what fits, what learns, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from unmask.core.errors import UnmaskError
from unmask.core.training.recipe import RecipeError, load_recipe
from unmask.language.data.vocabulary import Vocabulary
from unmask.language.encoders.language_model import ModelSettings, language_model, last_hidden

OWN_PAD = Vocabulary(40, 4, 2, 3, 0, 1, (0, 1, 2, 3, 4), "own pad")
EOS_PADS = Vocabulary(40, 39, None, 3, 3, None, (3, 39), "the end token pads")
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_end_token_that_pads_learns(architecture: str) -> None:
    shape = SHAPE if architecture == "llama" else {"n_embd": 16, "n_layer": 1, "n_head": 2}
    model = language_model(ModelSettings(architecture, shape), EOS_PADS, "causal", 8)
    last_hidden(model, torch.tensor([[5, 3, 6, 3]])).square().sum().backward()
    assert model.get_input_embeddings().weight.grad[3].any()


def test_positions_that_count_from_the_pad_token() -> None:
    settings = ModelSettings("roberta", SHAPE | {"max_position_embeddings": 16})
    model = language_model(settings, OWN_PAD, "masked", 15)
    last_hidden(model, torch.randint(5, 40, (2, 15)))
    with pytest.raises(UnmaskError, match="sees 15 tokens at most.*raise max_position_embeddings to 17"):
        language_model(settings, OWN_PAD, "masked", 16)
    with pytest.raises(UnmaskError, match="counts positions from its pad token"):
        language_model(settings, EOS_PADS, "masked", 8)


def test_a_bias_that_nothing_uses_is_frozen() -> None:
    settings = ModelSettings("roberta", SHAPE | {"max_position_embeddings": 64, "tie_word_embeddings": False})
    model = language_model(settings, OWN_PAD, "masked", 8)
    tokens = torch.randint(5, 40, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead, dead


def test_shared_positions_cannot_spare_special_tokens() -> None:
    overrides = {"model.share_positions": True, "model.keep_special": True}
    with pytest.raises(RecipeError, match="set share_positions to false"):
        load_recipe("language/meap", "tiny", overrides)


def test_wrong_names() -> None:
    with pytest.raises(UnmaskError, match="has no 'lama'"):
        language_model(ModelSettings("lama"), OWN_PAD, "causal", 8)
    with pytest.raises(UnmaskError, match="llama has no hidden_sise"):
        language_model(ModelSettings("llama", {"hidden_sise": 3}), OWN_PAD, "causal", 8)
    assert transformers.__version__

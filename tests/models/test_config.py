import dataclasses

import families
import pytest

from ain_jax.models.config import (
    ModelConfig,
    TextConfig,
    VisionConfig,
    allam_7b,
    from_hf,
    gemma_7b,
    llama_2,
    llama_3_8b,
    pangea_7b,
    qwen2_7b,
    qwen2_vl_7b,
    tiny,
    to_hf,
)
from ain_jax.models.multimodal import parameter_count

# config.json of Qwen2-VL-7B-Instruct as published.
PUBLISHED = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
NESTED = {  # as transformers 5 saves it
    "model_type": "qwen2_vl",
    "tie_word_embeddings": False,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        "model_type": "qwen2_vl_text",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "layer_types": ["full_attention"] * 28,
        "sliding_window": None,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": None,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1000000.0, "rope_type": "default"},
    },
    "vision_config": {
        "model_type": "qwen2_vl_vision",
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "hidden_act": "quick_gelu",
        "in_channels": 3,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    },
}


def test_a_tied_head_counts_once():
    tied, untied = tiny(tied=True), tiny(tied=False)
    assert parameter_count(untied) - parameter_count(tied) == tied.text.vocabulary * tied.text.width


@pytest.mark.parametrize("attributes", [PUBLISHED, NESTED], ids=["flat", "nested"])
def test_published_layouts_are_read(attributes):
    assert from_hf(attributes) == qwen2_vl_7b()


@pytest.mark.parametrize("config", [qwen2_vl_7b(), tiny(), tiny(tied=False, norm_eps=1e-5)])
def test_written_and_read_again(config):
    assert from_hf(to_hf(config)) == config


def test_rotary_settings_are_written_in_both_spellings():
    written = to_hf(tiny())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10_000.0
    assert written["rope_scaling"] == {"type": "mrope", "mrope_section": [2, 1, 1]}
    assert written["rope_parameters"]["mrope_section"] == [2, 1, 1]
    assert "text_config" not in written  # transformers 4.51 refuses it


def test_every_attribute_that_is_not_handled_is_named():
    odd = PUBLISHED | {"hiden_size": 4096, "use_sliding_window": True, "hidden_act": "relu"}
    odd["rope_scaling"] = {"type": "longrope", "factor": 4.0, "mrope_section": [16, 24, 24]}
    odd["vision_config"] = PUBLISHED["vision_config"] | {"fullatt_block_indexes": [7]}
    with pytest.raises(ValueError) as error:
        from_hf(odd)
    for words in ("hiden_size=4096", "did you mean hidden_size", "use_sliding_window=True; expected False"):
        assert words in str(error.value)
    for words in ("'relu'", "'longrope'", "vision_config.fullatt_block_indexes=[7]"):
        assert words in str(error.value)


def test_a_setting_that_its_kind_of_rotary_positions_lacks_is_named():
    with pytest.raises(ValueError, match="rope setting factor=4.0 is not handled"):
        from_hf(PUBLISHED | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24], "factor": 4.0}})


def test_attributes_of_published_copies_that_say_nothing_are_passed_over():
    written = to_hf(llama_3_8b())
    said = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}, "pretraining_tp": 1}
    assert from_hf(written | said) == llama_3_8b()
    with pytest.raises(ValueError, match="rope_interleaved=True; expected False"):
        from_hf(written | {"rope_interleaved": True})


PUBLISHED_COUNTS = {
    "llama-2-7b": (llama_2("7b"), 6_738_415_616),
    "llama-2-13b": (llama_2("13b"), 13_015_864_320),
    "llama-2-70b": (llama_2("70b"), 68_976_648_192),
    "allam-7b": (allam_7b(), 7_000_559_616),
    "llama-3-8b": (llama_3_8b(), 8_030_261_248),
    "gemma-7b": (gemma_7b(), 8_537_680_896),
    "qwen2-7b": (qwen2_7b(), 7_615_616_512),
    "qwen2-vl-7b": (qwen2_vl_7b(), 8_291_375_616),
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_named_sizes_have_the_published_numbers_of_parameters(name):
    config, count = PUBLISHED_COUNTS[name]
    assert parameter_count(config) == count
    assert from_hf(to_hf(config)) == config


def test_pangea_is_its_decoder_its_tower_and_a_projector():
    projector = 1024 * 3584 + 3584 + 3584 * 3584 + 3584
    tower = 303_507_456  # CLIP ViT-L/14-336 without its projection
    assert parameter_count(pangea_7b()) == 7_615_616_512 + tower + projector + 3584
    assert from_hf(to_hf(pangea_7b())) == pangea_7b()


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="no Llama 2 of size '8b'; expected one of 7b, 13b, 70b"):
        llama_2("8b")


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="model_type='qwen3', expected one of llama, mistral, qwen2, "):
        from_hf(PUBLISHED | {"model_type": "qwen3"})


def test_a_config_without_a_place_in_the_published_layout_is_not_written():
    with pytest.raises(ValueError, match="head_width=16, but a qwen2_vl has width / heads = 8"):
        to_hf(tiny(head_width=16, mrope_section=(4, 2, 2)))
    with pytest.raises(ValueError, match="no place in the config.json of a qwen2_vl: text.o_bias=True becomes False"):
        to_hf(tiny(o_bias=True))
    with pytest.raises(ValueError, match="a qwen2_vl has an image encoder"):
        to_hf(tiny(vision=False))


def test_impossible_sizes_are_refused_together():
    text = tiny().text
    with pytest.raises(ValueError, match=r"heads=4 is no multiple of kv_heads=3.*mrope_section=\(1, 1, 1\)"):
        dataclasses.replace(text, kv_heads=3, mrope_section=(1, 1, 1))
    with pytest.raises(ValueError, match="head width divisible by 4"):
        VisionConfig(width=20, layers=1, heads=2, mlp_width=80)
    with pytest.raises(ValueError, match="image_token_id=700 lies outside the vocabulary of 192"):
        dataclasses.replace(tiny(), image_token_id=700)


def test_a_text_model_needs_no_picture_ids():
    text = TextConfig(vocabulary=32, width=16, mlp_width=32, layers=1, heads=2, kv_heads=2, head_width=8)
    assert ModelConfig(text).vision is None


def test_a_gemma_3_that_ends_before_its_first_full_layer():
    short = dataclasses.replace(families.TEXTS["gemma 3"].text, layers=3, windows=(8,))
    config = dataclasses.replace(families.TEXTS["gemma 3"], text=short)
    assert from_hf(to_hf(config)) == config
    old = {name: value for name, value in to_hf(config).items() if name != "layer_types"}
    assert from_hf(old) == config  # by the rule of transformers 4


def test_rotary_positions_that_are_told_oddly():
    written = to_hf(llama_3_8b())
    assert from_hf(written | {"partial_rotary_factor": 1.0}) == llama_3_8b()
    assert from_hf(written | {"rope_parameters": written["rope_parameters"] | {"partial_rotary_factor": 1.0}}).text
    for odd, words in (
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; expected 1.0"),
        (
            {"rope_parameters": None, "rope_scaling": {"factor": 4.0}},
            "rope settings factor without rope_type; expected",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": "1"}},
            "mscale='1'; expected a number above 0",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            from_hf(written | odd)

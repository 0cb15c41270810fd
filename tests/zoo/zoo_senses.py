"""Vision, speech, and several senses at once."""

# ruff: noqa: E501 - a row a line

from __future__ import annotations

import torch
from torch import Tensor
from zoo_kit import endless
from zoo_models import SIZE, TEXT, VOCABULARY, hf, images, plain_ids, together, tokens, unlabelled, waves

PATCHES = {**SIZE, "image_size": 16, "patch_size": 8, "num_labels": 2}
STAGES = {
    "num_labels": 2,
    "depths": [1, 1],
    "embed_dim": 8,
    "num_heads": [1, 2],
    "image_size": 16,
    "patch_size": 2,
    "window_size": 4,
}
WAVES = {**SIZE, "vocab_size": 32, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "pad_token_id": 0}  # fmt: skip
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
CLIP_TEXT = {**TEXT, "projection_dim": 8, "max_position_embeddings": 16}
CLIP_VISION = {**SIZE, "image_size": 16, "patch_size": 8, "projection_dim": 8}

ENDLESS = {"reentrant": endless("the first layer's position bias is an input of all others")}


def features(draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 40, generator=draw, dtype=torch.float64), "labels": tokens(draw, 2, 6)}


def frames(draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 24, 8, generator=draw, dtype=torch.float64), "labels": tokens(draw, 2, 6)}


def ctc(draw: torch.Generator) -> dict[str, Tensor]:
    return {**waves()(draw), "labels": tokens(draw, 2, 4, below=32)}


def looking(draw: torch.Generator) -> dict[str, Tensor]:
    """An image's place in a text: four patches of token 60."""
    ids = tokens(draw, 2, 8, below=60)
    ids[:, 1:5] = 60
    return {"input_ids": ids, "labels": ids, **images(16, labelled=False)(draw)}


def masks(draw: torch.Generator) -> dict[str, Tensor]:
    return {**images(32, labelled=False)(draw), "labels": torch.randint(0, 2, (2, 32, 32), generator=draw)}


def video(draw: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(2, 4, 3, 16, 16, generator=draw, dtype=torch.float64),
        "labels": torch.randint(0, 2, (2,), generator=draw),
    }


def spectrogram(draw: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_values": torch.randn(2, 24, 16, generator=draw, dtype=torch.float64),
        "labels": torch.randint(0, 2, (2,), generator=draw),
    }


VISION = [
    hf("vit", "ViTConfig", "ViTForImageClassification", PATCHES, images(), short=True),
    hf("deit", "DeiTConfig", "DeiTForImageClassification", PATCHES, images()),
    hf("beit", "BeitConfig", "BeitForImageClassification", {**PATCHES, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}, images()),
    hf("dinov2", "Dinov2Config", "Dinov2ForImageClassification", PATCHES, images()),
    hf("swin", "SwinConfig", "SwinForImageClassification", STAGES, images()),
    hf("swinv2", "Swinv2Config", "Swinv2ForImageClassification", STAGES, images(), short=True),
    hf("convnext", "ConvNextConfig", "ConvNextForImageClassification", {"num_labels": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "patch_size": 2, "image_size": 16}, images()),
    hf("convnextv2", "ConvNextV2Config", "ConvNextV2ForImageClassification", {"num_labels": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "patch_size": 2, "image_size": 16}, images()),
    hf("resnet", "ResNetConfig", "ResNetForImageClassification", {"num_labels": 2, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, images(32), short=True),
    hf("regnet", "RegNetConfig", "RegNetForImageClassification", {"num_labels": 2, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8}, images(32)),
    hf("segformer", "SegformerConfig", "SegformerForSemanticSegmentation", {"num_labels": 2, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 8, "sr_ratios": [4, 2, 1, 1], "mlp_ratios": [2, 2, 2, 2]}, masks),
    hf("levit", "LevitConfig", "LevitForImageClassification", {"num_labels": 2, "image_size": 64, "patch_size": 16, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]}, images(64)),
    hf("poolformer", "PoolFormerConfig", "PoolFormerForImageClassification", {"num_labels": 2, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "num_encoder_blocks": 4}, images(32)),
    hf("vit-mae", "ViTMAEConfig", "ViTMAEForPreTraining", {**PATCHES, "decoder_num_attention_heads": 2, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 24}, images(16, labelled=False)),
    hf("yolos", "YolosConfig", "YolosForObjectDetection", {**PATCHES, "image_size": [16, 16], "num_detection_tokens": 4}, images(16, labelled=False), output="pred_boxes"),
    hf("detr", "DetrConfig", "DetrForObjectDetection", {**BART, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "out_features": ["stage2"]}), "num_queries": 4, "num_labels": 2}, images(32, labelled=False), output="logits"),
    hf("videomae", "VideoMAEConfig", "VideoMAEForVideoClassification", {**PATCHES, "num_frames": 4, "tubelet_size": 2}, video),
    hf("timesformer", "TimesformerConfig", "TimesformerForVideoClassification", {**PATCHES, "num_frames": 4}, video),
]  # fmt: skip

SPEECH = [
    hf("whisper", "WhisperConfig", "WhisperForConditionalGeneration", {**BART, "vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None}, features, short=True),
    hf("wav2vec2", "Wav2Vec2Config", "Wav2Vec2ForCTC", WAVES, ctc, short=True),
    hf("hubert", "HubertConfig", "HubertForCTC", WAVES, ctc),
    hf("wavlm", "WavLMConfig", "WavLMForCTC", {**WAVES, "num_buckets": 8, "max_bucket_distance": 16}, ctc, expects=ENDLESS),
    hf("unispeech-sat", "UniSpeechSatConfig", "UniSpeechSatForCTC", WAVES, ctc),
    hf("sew", "SEWConfig", "SEWForCTC", {**WAVES, "squeeze_factor": 2}, ctc),
    hf("wav2vec2-conformer", "Wav2Vec2ConformerConfig", "Wav2Vec2ConformerForCTC", {**WAVES, "conv_depthwise_kernel_size": 3}, ctc),
    hf("speech2text", "Speech2TextConfig", "Speech2TextForConditionalGeneration", {**BART, "vocab_size": 64, "input_feat_per_channel": 8, "num_conv_layers": 2, "conv_channels": 8, "max_source_positions": 64, "max_target_positions": 16}, frames),
    hf("audio spectrogram transformer", "ASTConfig", "ASTForAudioClassification", {**SIZE, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 24, "num_mel_bins": 16, "num_labels": 2}, spectrogram),
    hf("encodec", "EncodecConfig", "EncodecModel", {"num_filters": 2, "num_residual_layers": 1, "upsampling_ratios": [2, 2], "hidden_size": 8, "codebook_size": 16, "codebook_dim": 8, "num_lstm_layers": 1, "target_bandwidths": [24.0], "sampling_rate": 24000}, lambda d: {"input_values": torch.randn(2, 1, 64, generator=d, dtype=torch.float64), "padding_mask": torch.ones(2, 1, 64, dtype=torch.bool)}, output="audio_values"),
]  # fmt: skip

SENSES = [
    hf("clip", "CLIPConfig", "CLIPModel", {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 8}, together(unlabelled, images(16, labelled=False)), output="logits_per_text", short=True),
    hf("siglip", "SiglipConfig", "SiglipModel", {"text_config": {**TEXT, "max_position_embeddings": 16, "projection_size": 16}, "vision_config": {**SIZE, "image_size": 16, "patch_size": 8}}, together(plain_ids, images(16, labelled=False)), output="logits_per_text"),
    hf("blip", "BlipConfig", "BlipForConditionalGeneration", {"text_config": {**TEXT, "encoder_hidden_size": 16}, "vision_config": {**SIZE, "image_size": 16, "patch_size": 8}, "projection_dim": 8}, together(lambda d: {"input_ids": (i := tokens(d, 2, 8)), "labels": i}, images(16, labelled=False))),
    hf("llava", "LlavaConfig", "LlavaForConditionalGeneration", {"vision_config": ("CLIPVisionConfig", CLIP_VISION), "text_config": ("LlamaConfig", TEXT), "image_token_id": 60, "vision_feature_layer": -1}, looking),
    hf("clap", "ClapConfig", "ClapModel", {"text_config": {**TEXT, "projection_dim": 8}, "audio_config": {"hidden_size": 32, "depths": [1, 1], "num_attention_heads": [1, 2], "patch_embeds_hidden_size": 16, "spec_size": 32, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 8, "window_size": 4, "num_classes": 2, "enable_fusion": False, "num_hidden_layers": 2, "projection_dim": 8}, "projection_dim": 8}, together(unlabelled, lambda d: {"input_features": torch.randn(2, 1, 64, 8, generator=d, dtype=torch.float64), "is_longer": torch.zeros(2, 1, dtype=torch.bool)}), output="logits_per_text"),
    hf("vilt", "ViltConfig", "ViltModel", {**TEXT, "image_size": 16, "patch_size": 8, "max_image_length": -1}, together(unlabelled, images(16, labelled=False)), output="last_hidden_state"),
    hf("git", "GitConfig", "GitForCausalLM", {**TEXT, "vision_config": CLIP_VISION}, together(lambda d: {"input_ids": (i := tokens(d, 2, 8)), "labels": i}, images(16, labelled=False))),
    hf("trocr decoder", "TrOCRConfig", "TrOCRForCausalLM", {"vocab_size": VOCABULARY, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_position_embeddings": 64}, lambda d: {"input_ids": (i := tokens(d, 2, 8)), "labels": i}),
    hf("qwen2-vl, text alone", "Qwen2VLTextConfig", "Qwen2VLTextModel", {**TEXT, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}, plain_ids, output="last_hidden_state"),
]  # fmt: skip

ROWS = [*VISION, *SPEECH, *SENSES]

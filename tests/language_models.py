"""Tiny language models of Hugging Face, nothing to fetch, and batches as people have them."""

import torch

VOCABULARY = 31

_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

_WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}

_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}

MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _WIDE),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _WIDE),
    "bert masked": ("BertForMaskedLM", "BertConfig", _WIDE),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "bart decoder": ("BartForCausalLM", "BartConfig", _BART),
    "gpt2 sequences": ("GPT2ForSequenceClassification", "GPT2Config", {**_GPT2, "num_labels": 3}),
    "gpt2 tokens": ("GPT2ForTokenClassification", "GPT2Config", {**_GPT2, "num_labels": 3}),
    "gpt2 values": ("GPT2ForSequenceClassification", "GPT2Config", {**_GPT2, "num_labels": 1}),
}
"""Class, configuration and sizes by a short name."""


def make_language_model(name, dtype=torch.float64):
    """Return a tiny model in eval mode, always with the same weights."""
    import transformers

    kind, config, sizes = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    return model.to(dtype).eval()


def make_batch(name, dtype=torch.float64, *, n_samples=3, length=6):
    """Return a batch with its labels inside; the last row ends in two padding tokens, without."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (n_samples, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, 2] = -100
    if name == "gpt2 sequences":
        labels = torch.arange(n_samples) % 3
    elif name == "gpt2 values":
        labels = torch.randn(n_samples, generator=generator, dtype=dtype)
    elif name == "gpt2 tokens":
        labels = torch.where(labels == -100, -100, labels % 3)
    elif name in ("t5", "bart"):
        labels = labels[:, : length - 1].clone()
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

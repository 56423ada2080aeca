"""A tower and a language model of a few thousand parameters."""

TOWERS = {"tiny": {"id": "convnext_atto", "depths": [1, 1, 1, 1], "dims": [8, 16, 16, 8]}}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 768,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

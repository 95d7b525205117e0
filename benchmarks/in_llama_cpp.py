"""llama.cpp's steps for `generation.py`; it runs in a process of its own, so that what crashes is one contender.

    python in_llama_cpp.py makes MODEL.gguf '{"hidden_size": …}'     a file of random weights, fp16
    python in_llama_cpp.py runs MODEL.gguf TYPE THREADS              answers lines on stdin with lines of JSON:
                                                   decode N  ->  seconds of each of N steps behind 64 tokens
                                                   prefill N ->  seconds of a prompt of N tokens, up to its last logits

It needs the packages `llama-cpp-python` and `gguf`, here or in the environment whose Python `--llama-cpp` names. TYPE
is one of `TYPES`: llama.cpp's own quantisation of the fp16 file.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

#: Name -> llama.cpp's `llama_ftype`.
TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "BF16": 32}
PROMPT = 64
CONTEXT = 1024


def makes(path: str, config: str) -> None:
    """Writes a model without a vocabulary: its ids are all that is asked for."""
    import gguf

    fields = json.loads(config)
    width, feed_forward = fields["hidden_size"], fields["intermediate_size"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    kv_width = width // heads * kv_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_file_type(TYPES["F16"])
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            writer.add_tensor(name, (random.standard_normal(shape, np.float32) * 0.02).astype(np.float16))

    add("token_embd.weight", fields["vocab_size"], width)
    for layer in range(fields["num_hidden_layers"]):
        for name, shape in {
            "attn_norm": (width,), "attn_q": (width, width), "attn_k": (kv_width, width), "attn_v": (kv_width, width),
            "attn_output": (width, width), "ffn_norm": (width,), "ffn_gate": (feed_forward, width),
            "ffn_up": (feed_forward, width), "ffn_down": (width, feed_forward),
        }.items():  # fmt: skip
            add(f"blk.{layer}.{name}.weight", *shape)
    add("output_norm.weight", width)
    add("output.weight", fields["vocab_size"], width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def runs(path: str, kind: str, threads: str) -> None:
    """Makes the file of this type, if need be, and steps as it is told."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    file = path if kind == "F16" else path.replace(".gguf", f"-{kind}.gguf")
    if not Path(file).exists():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = TYPES[kind], int(threads)
        if llama_cpp.llama_model_quantize(path.encode(), file.encode(), ctypes.byref(settings)):
            raise SystemExit(f"llama.cpp does not make {kind} of {path}")
    loading = llama_cpp.llama_model_default_params()
    loading.use_mmap = False  # memory of its own may lie in large pages, as ours does
    model = llama_cpp.llama_model_load_from_file(file.encode(), loading)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, 512, 512
    settings.n_threads = settings.n_threads_batch = int(threads)
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    ids = np.random.default_rng(0).integers(3, vocabulary, CONTEXT).tolist()

    def forward(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama.cpp fails to decode")
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,)).argmax()

    def forget() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    size = os.path.getsize(file)
    print(json.dumps({"version": llama_cpp.__version__, "size_bytes": size, "system": _system(llama_cpp)}), flush=True)
    for line in sys.stdin:
        work, count = line.split()
        forget()
        if work == "prefill":
            seconds = [_timed(forward, ids[: int(count)])]
        else:
            forward(ids[:PROMPT])
            seconds = [_timed(forward, [id]) for id in ids[PROMPT : PROMPT + int(count)]]
        print(json.dumps(seconds), flush=True)


def _timed(forward: "object", tokens: list[int]) -> float:
    started = time.perf_counter()
    forward(tokens)  # type: ignore[operator]
    return time.perf_counter() - started


def _system(llama_cpp: "object") -> str:
    return llama_cpp.llama_print_system_info().decode()  # type: ignore[attr-defined, no-any-return]


if __name__ == "__main__":
    {"makes": makes, "runs": runs}[sys.argv[1]](*sys.argv[2:])

"""Check the GGUF files of QUANT.py in llama.cpp: greedy tokens against INFER.generate, and token ids of texts.

    python bench/llamacpp.py --llama PATH/bin/python              # small random models of each family, all kinds of tokenizers
    python bench/llamacpp.py --llama PATH/bin/python --model out  # a trained model

PATH is an environment with `xllamacpp`. Each model completes prompts with 64 greedy tokens, in F32 and with weights rounded to F16.
Prompts whose completion changes with a little noise on the weights are skipped. In the other types, the log-probabilities of the
first token after each prompt are compared with those of the original weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 64
NOISE = {"F32": 2e-5, "F16": 1e-3}  # relative; the best two tokens must differ by 5 times this in nats
BOUND = {"F32": 1e-3, "F16": 0.05}  # maximum difference of log-probabilities
MEAN_BOUND = {"BF16": 0.03, "Q8_0": 0.1, "Q5_1": 0.3, "Q5_0": 0.3, "Q4_1": 0.6, "Q4_0": 0.6}  # maximum mean difference
TEXT = ("Once upon a time, Zoë's dog didn't see 3 cats, 1234567 mice and 3.14 owls.\n\n  def f(x):\n\treturn x**2  # ok!!\n"
        "你好，世界！ Привет, мир. नमस्ते ŝafoj HTTPServer I'VE we'Ll\r\n 😀🚀👩‍👩‍👧 café naïve <b>x_y</b>   end \n")
SHAPE = dict(vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.08)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2)
LATENT = dict(model_type="deepseek_v3", num_key_value_heads=4, rms_norm_eps=1e-6, kv_lora_rank=64, q_lora_rank=96,
              qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, rope_interleave=True, n_shared_experts=1, n_group=4,
              topk_group=2, scoring_func="sigmoid", mlp_only_layers=[0], moe_intermediate_size=96, routed_scaling_factor=2.5,
              num_experts=16, num_experts_per_tok=3)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "GPT-2": "gpt2",
    "Llama": dict(model_type="llama"),
    "Llama, wide heads, tied": dict(model_type="llama", head_dim=48, tie_word_embeddings=True),
    "Llama, biases": dict(model_type="llama", attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "Llama, linear RoPE": dict(model_type="llama", rope_scaling=dict(rope_type="linear", factor=4.0)),
    "Llama, llama3 RoPE": dict(model_type="llama", rope_scaling=LLAMA3),
    "Llama, YaRN": dict(model_type="llama", rope_scaling=YARN),
    "Llama, YaRN with a factor": dict(model_type="llama", rope_scaling=dict(YARN, attention_factor=0.8)),
    "Mistral": dict(model_type="mistral", sliding_window=128),
    "Mixtral": dict(model_type="mixtral", **EXPERTS),
    "Qwen2": dict(model_type="qwen2", attention_bias=True),
    "Qwen3": dict(model_type="qwen3", qk_norm=True, head_dim=48, rms_norm_eps=1e-6),
    "Qwen3, YaRN": dict(model_type="qwen3", qk_norm=True, rope_scaling=YARN),
    "Qwen3-MoE": dict(model_type="qwen3_moe", qk_norm=True, moe_intermediate_size=96, **EXPERTS),
    "DeepSeek-V3": LATENT,
    "DeepSeek-V3, YaRN, full queries": dict(LATENT, q_lora_rank=None, n_group=1, topk_group=1,
                                            rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0)),
}


def llama_cpp(job: dict) -> dict:
    """Run a job in llama.cpp's server. The other interpreter calls this."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.port, settings.warmup = job["gguf"], 256, 1, 0, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in 16 bits
    if job.get("adapter"):
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
    server = xllamacpp.Server(settings)

    def post(path: str, **values) -> dict:
        request = urllib.request.Request(server.listening_address + path, json.dumps(values).encode())
        return json.loads(urllib.request.urlopen(request).read())

    complete = partial(post, "/completion", temperature=0, cache_prompt=False, return_tokens=True)
    first = [complete(prompt=ids, n_predict=1, n_probs=2**20).get("completion_probabilities", [{}])[0]
             for ids in job.get("prompts", [])]  # no probabilities at the end of a text
    return {"tokens": [complete(prompt=ids, n_predict=TOKENS)["tokens"] for ids in job.get("prompts", [])],
            "first": [{entry["id"]: entry["logprob"] for entry in token.get("top_logprobs", [])} for token in first],
            "ids": [post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
                    for text in job.get("texts", [])]}


def run_job(interpreter: str, **job) -> dict:
    run = subprocess.run([interpreter, __file__, "--run", json.dumps(job)], capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"llama.cpp: {run.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def make_model(shape: dict | str, stops: list[int]):
    import torch

    import MODEL

    special = dict(bos_token_id=stops[0], eos_token_id=stops)
    config = (MODEL.preset_config("gpt2-2m", **{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}, **special)
              if shape == "gpt2" else MODEL.ModelConfig(**{**SHAPE, **shape, **special}))
    model = MODEL.build(config, seed=1).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # norms and biases that have an effect
            if tensor.dim() == 1:
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return model


def greedy(model, noise: float) -> tuple[list, list]:
    """(prompts, completions) without those that change with a little noise on the weights, because rounding decides between two
    tokens, or two experts of a router, with nearly equal scores."""
    import torch

    import INFER

    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high, size: torch.randint(low, high, (size,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(5, model.config.vocab_size, length) for length in draw(3, 40, 24)]
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    completions = []
    for scale in (noise, noise, 0):
        for name, tensor in model.state_dict().items():
            tensor.copy_(exact[name] * (1 + scale * torch.randn(tensor.shape, generator=generator)))
        sampling = INFER.Sampling(TOKENS, 0, logprobs=True, top_logprobs=2)
        completions.append([row for (row,) in INFER.generate(model, prompts, sampling)])
    gap = lambda row: min(max(best.values()) - min(best.values()) for best in row.best)  # noqa: E731
    stable = [i for i, rows in enumerate(zip(*completions, strict=True))
              if all(row.ids == rows[0].ids and gap(row) > 5 * noise for row in rows)]
    return [prompts[i] for i in stable], [completions[-1][i].ids for i in stable]


def differences(model, prompts: list, theirs: list):
    """The differences of all log-probabilities of the first token after each prompt."""
    import torch

    ours = [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]
    return torch.tensor([abs(row[int(i)].item() - value) for row, logprobs in zip(ours, theirs, strict=True)
                         for i, value in logprobs.items()])


def compare(interpreter: str, label: str, model, tokenizer, folder: Path, adapter: bool = False, texts: tuple = ()) -> bool:
    """Compare a model in each type and print a line per type. Returns whether all agree."""
    import MODEL
    import QUANT

    good, stops, job, exported = True, set(model.config.eos_ids), {}, model
    approximate = model.config.hidden_act != "silu"  # llama.cpp computes GELU with a 16-bit table
    if adapter:
        QUANT.export_gguf_adapter(model, tokenizer, folder / "adapter", QUANT.QuantizationSection())
        job = {"adapter": str(folder / "adapter/adapter.gguf")}
        exported = MODEL.build(model.config)
        exported.load_state_dict({name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()
                                  if not MODEL.tensor_is_trained(name)})
    for kind in ("F32",) if adapter else ("F32", "F16"):
        for tensor in model.state_dict().values() if kind == "F16" else ():
            if tensor.dim() > 1:
                tensor.copy_(tensor.half().float())
        prompts, ours = greedy(model, NOISE["F16" if approximate else kind])
        QUANT.export_gguf(exported, tokenizer, folder / "model", QUANT.QuantizationSection(gguf_type=kind))
        theirs = run_job(interpreter, gguf=str(folder / "model/model.gguf"), prompts=prompts, texts=texts, **job)
        same = [[i for i in a if i not in stops] == [i for i in b if i not in stops]
                for a, b in zip(ours, theirs["tokens"], strict=True)]
        split = [theirs["ids"][i] == tokenizer(text).input_ids for i, text in enumerate(texts)]
        difference = float(differences(model, prompts, theirs["first"]).max())
        print(f"{label:32} {kind}: {sum(same)} of {len(same)} completions equal ({sum(map(len, ours))} tokens), log-probabilities "
              f"differ by at most {difference:.1e}" + (f", {sum(split)} of {len(split)} texts equal" if texts else ""), flush=True)
        good = good and all(same) and bool(same) and all(split) and difference < BOUND["F16" if approximate else kind]
    means = {}
    for kind in () if adapter else MEAN_BOUND:
        QUANT.export_gguf(exported, tokenizer, folder / "model", QUANT.QuantizationSection(gguf_type=kind))
        theirs = run_job(interpreter, gguf=str(folder / "model/model.gguf"), prompts=prompts)
        means[kind] = float(differences(model, prompts, theirs["first"]).mean())
    if means:
        print(f"{label:32} mean difference of log-probabilities: " + ", ".join(f"{kind} {mean:.3f}" for kind, mean in means.items()))
    return good and all(mean < MEAN_BOUND[kind] for kind, mean in means.items())


def make_tokenizers() -> dict:
    """Train tokenizers: TOKENIZER.py's kinds, SentencePiece's BPE, and a BPE for each pre-tokenizer of llama.cpp."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    import QUANT
    import TOKENIZER

    texts = [TEXT * 3, (ROOT / "data" / "train.txt").read_text()[:200_000]]
    found = {kind: TOKENIZER.train(texts, 700, kind) for kind in ("bpe", "byte", "char")}

    def wrapped(raw):
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")

    raw = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    raw.decoder = decoders.Sequence([*steps])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = [line.replace(" ", " \u2581").split(" ") for line in texts[1].splitlines()]  # merges within words only
    raw.train_from_iterator((word for line in words for word in line), trainers.BpeTrainer(vocab_size=700, special_tokens=special,
                                                                                          show_progress=False))
    spec = json.loads(raw.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    raw = Tokenizer.from_str(json.dumps(spec))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    found["SentencePiece"] = wrapped(raw)
    for name, patterns in QUANT.PRE_TOKENIZERS.items():
        raw = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
        raw.pre_tokenizer = pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        raw.decoder = decoders.ByteLevel()
        raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=["<s>", "</s>"], show_progress=False,
                                                           initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
        found[name] = wrapped(raw)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", metavar="PYTHON", help="Python interpreter of an environment with xllamacpp")
    parser.add_argument("--model", help="folder of a trained model; without it, random models")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print("RESULT", json.dumps(llama_cpp(json.loads(options.run))))
        return
    sys.path[:0] = [str(ROOT)]
    import peft
    import torch

    import MODEL
    import QUANT
    import TOKENIZER

    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder, good = Path(scratch), True
        if options.model:
            model, tokenizer = MODEL.load(options.model), TOKENIZER.load(options.model)
            sys.exit(not compare(options.llama, Path(options.model).name, model, tokenizer, folder, texts=(TEXT, "Hello")))
        tokenizer = TOKENIZER.train([TEXT * 3], 300)
        stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(TOKENIZER.CHAT_TOKENS[1:])]
        for label, shape in MODELS.items():
            good &= compare(options.llama, label, make_model(shape, stops), tokenizer, folder)
        for label in ("Llama", "GPT-2", "Qwen2"):
            model = make_model(MODELS[label], stops)
            config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*_proj", alpha_pattern={"o_proj": 12})
            MODEL.inject(config, model)
            model.adapter = config
            for name, tensor in model.state_dict().items():
                if ".lora_" in name:
                    tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
            good &= compare(options.llama, f"{label} with LoRA", model, tokenizer, folder, adapter=True)
        model = make_model(dict(model_type="llama", vocab_size=1000, num_hidden_layers=1), stops)
        texts = [TEXT, " Hello  world", "x", "\n\n", *TEXT.split(" ")]
        for label, tokenizer in make_tokenizers().items():
            lines = texts
            if label == "char":  # without unknown characters
                lines = [text for text in texts if tokenizer.unk_token_id not in tokenizer(text).input_ids]
            QUANT.export_gguf(model, tokenizer, folder / "tokenizer", QUANT.QuantizationSection())
            theirs = run_job(options.llama, gguf=str(folder / "tokenizer/model.gguf"), texts=lines)["ids"]
            wrong = [text for text, ids in zip(lines, theirs, strict=True) if ids != tokenizer(text).input_ids]
            print(f"tokenizer {label:14} {len(lines) - len(wrong)} of {len(lines)} texts equal"
                  + (f"; different: {wrong[:3]!r}" if wrong else ""))
            good &= not wrong
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

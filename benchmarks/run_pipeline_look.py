"""How long it takes to look at a step before training, to find out how a model is cut: once for each form of microbatches.

    python benchmarks/run_pipeline_look.py --layers 80 --stages 8

The model is a Llama of the sizes of 70B on the meta device, looked at for its loss of 1 x 128 tokens. Each round looks at it
once; the first one also finds out what each operation makes, which later ones remember.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch

from meshbolt.pipeline import Calls, analyse


def main() -> int:
    """Look at it as often as asked, and print the seconds of each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = _llama(options.layers)
    ids = torch.zeros(1, 128, dtype=torch.long)
    cuts = [f"model.layers.{options.layers * stage // options.stages}" for stage in range(1, options.stages)]
    for number in range(options.rounds):
        calls = Calls(model, cuts)
        begin = time.perf_counter()
        analyse(model, calls, lambda: model(input_ids=ids, labels=ids).loss, device=torch.device("cpu"))
        print(f"round {number}: {time.perf_counter() - begin:.3f} s")
        calls.remove()
    return 0


def _llama(layers: int) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        use_cache=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


if __name__ == "__main__":
    raise SystemExit(main())

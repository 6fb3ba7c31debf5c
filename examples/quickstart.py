"""One line rewrites a model: a small Llama, one training step, and the report of what was done."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphfuse


def main() -> None:
    """Compile, train one step, read the report."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=2)
    model = LlamaForCausalLM(config).to(device)

    # aot_eager needs no C++ compiler; leave `inner` out to have Inductor compile the rest.
    model = graphfuse.optimize(model, inner="aot_eager")

    tokens = torch.randint(1000, (2, 64), device=device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    print(f"loss {loss.item():.4f}")
    print(graphfuse.report(model))


if __name__ == "__main__":
    main()

"""One process of `torchrun`: a shell sharded by transformers' plans must have the gradients that one process has."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import shell, tokens
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

STACK = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_attention_kind": "delta",
    "full_attention_kind": "latent",
    "num_shared_experts": 1,
}


def gradients(model, ids):
    model.train()
    out = model(ids, labels=ids, output_router_stats=True)
    out.loss.backward()
    whole = {name: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for name, p in model.named_parameters()}
    return whole, torch.stack([layer.counts for layer in out.router_stats])


def main(folder: Path) -> None:
    torch.manual_seed(0)
    alone, ids = shell(**STACK), tokens(4, 33)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        alone.save_pretrained(folder / "one")
    dist.barrier()
    want, counts = gradients(alone, ids)
    for name, plan in {"fsdp": {"fsdp_size": size}, "ep": {"fsdp_size": size, "ep_size": size}}.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "one", distributed_config=DistributedConfig(**plan))
        got, here = gradients(model, ids[rank::size])
        dist.all_reduce(here)
        assert torch.equal(here, counts), f"{name}: expert counts"
        for key, grad in want.items():
            error = ((got[key] - grad).norm() / grad.norm()).item()
            assert error < 1e-5, f"{name}: gradient of {key} is off by {error:.1e}"
        share = model.model.layers[0].mlp.experts.gate_up_proj.to_local().shape[0]
        assert share * size == alone.config.num_experts, f"{name}: {share} experts in each process"
        model.save_pretrained(folder / name)
    dist.destroy_process_group()


main(Path(sys.argv[1]))

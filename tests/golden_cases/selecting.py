"""Cases of mining several generators: minegan_multi_select."""

from __future__ import annotations

import torch
from adafm_trainer.methods import losses
from adafm_trainer.models import selecting
from torch import Tensor

from .compare import GoldenFile


def multi_select(golden: GoldenFile) -> dict[str, Tensor]:
    scores, norms, logits = (
        golden.get(f"in.{name}").double().requires_grad_() for name in ("scores", "grad_norm", "selector_logits")
    )
    real, loss = golden.get("in.score_real").double(), losses.ADVERSARIAL["wgan-gp"]
    winner, batch_winner = selecting.winner_by_sample(scores), selecting.winner_by_batch(scores)
    won = selecting.of_winner(scores, winner)
    penalty = (selecting.of_winner(norms, winner) - 1).square().mean()
    d_loss = loss.fake(won) + loss.real(real) + float(golden.metadata["lam"]) * penalty
    g_loss, ce = loss.generator(won), selecting.selector_loss(logits, winner)
    batch_g_loss = loss.generator(selecting.of_winner(scores, batch_winner))

    sequence = golden.get("in.score_seq")
    p, trace = torch.full((scores.shape[1],), 1 / scores.shape[1], dtype=torch.float64), []
    for step in sequence:
        frequency = selecting.winner_frequency(selecting.winner_by_sample(step), len(p))
        p = selecting.updated_probability(p, frequency, float(golden.metadata["rho"]))
        trace.append(p)

    d_wrt_scores, d_wrt_gradnorm = torch.autograd.grad(d_loss, (scores, norms), retain_graph=True)
    return {
        "out.winner": winner,
        "out.batch_winner": batch_winner[0],
        "out.d_loss": d_loss,
        "out.g_loss": g_loss,
        "out.batch_g_loss": batch_g_loss,
        "out.selector_ce": ce,
        "out.selector_prob": logits.softmax(1),
        "out.p_trace": torch.stack(trace),
        "grad.d_wrt_scores": d_wrt_scores,
        "grad.d_wrt_gradnorm": d_wrt_gradnorm,
        "grad.g_wrt_scores": torch.autograd.grad(g_loss, scores)[0],
        "grad.batch_g_wrt_scores": torch.autograd.grad(batch_g_loss, scores)[0],
        "grad.ce_wrt_logits": torch.autograd.grad(ce, logits)[0],
    }

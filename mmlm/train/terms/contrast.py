"""Contrast: views of the same record lie near each other, those of different records far apart (InfoNCE, van den Oord et
al. 2018; between pictures and texts in both directions: CLIP, Radford et al. 2021).

Every record of the step, on all ranks and in all micro-batches, is a negative of every other, so the loss does not depend
on how the step is cut. For that the embeddings of the whole step must be known before the first gradient: with one
micro-batch a rank they are gathered in the middle of its forward pass; with several, all views pass through the model once
without gradients before (GradCache, Gao et al. 2021), and the gradient of the loss at each embedding is what every
micro-batch then sends back. With dropout that gradient is the one at the embeddings of the first pass, whose masks are others.

Axes: V view, N view of the whole step, E embedding.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from mmlm.data.collate import Batch
from mmlm.data.views import View, only_views, pad_rows, view, with_views
from mmlm.model.flops import Shape
from mmlm.train.config import ContrastiveConfig
from mmlm.train.terms.term import Term


class Table(NamedTuple):
    """Embeddings of views, and what each one is of."""

    embedding_NE: torch.Tensor
    modality_N: torch.Tensor
    """The number of the modality in `Contrast.modalities`."""
    group_N: torch.Tensor
    """Views of one group are no negatives of each other."""
    record_N: torch.Tensor
    """The number of the record among all; views of one record are each other's positives."""


class Contrast:
    name = "contrastive"

    def __init__(self, config: ContrastiveConfig, across_ranks: bool = True) -> None:
        """`across_ranks`: every rank is here at the same time; without it, nothing is gathered."""
        self.config, self.weight, self.across_ranks = config, config.weight, across_ranks
        self.modalities = sorted({name for pair in config.between for name in pair})
        self._ahead: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        """Loss and gradient of each coming micro-batch's embeddings, where there are several."""

    def count(self, batch: Batch) -> float:
        """Pairs of views of one record."""
        has = {name: set(view(batch, name).record_V.tolist()) for name in self.modalities}
        return float(sum(len(has[a] & has[b]) for a, b in self.config.between))

    def views(self, batch: Batch) -> list[View]:
        return [view(batch, name) for name in self.modalities]

    def shape(self, batch: Batch) -> Shape:
        """What the widened `batch` asks of the model; its features are not copied for that."""
        return Shape.of(self.widen(_without_features(batch)))

    def shape_of_views(self, batch: Batch) -> Shape:
        """What the views of `batch` alone ask of it."""
        bare = _without_features(batch)
        views = [one for one in self.views(bare) if len(one.record_V)]
        return Shape.of(only_views(bare, views)) if views else Shape((), 0, read=0, prompts=())

    def widen(self, batch: Batch) -> Batch:
        """The batch with its views as further sequences."""
        return with_views(batch, self.views(batch))

    def prepare(self, model: torch.nn.Module, batches: list[Batch], device: torch.device) -> None:
        """Every rank calls it before the first forward pass of a step, with all its micro-batches."""
        self._ahead.clear()
        if len(batches) == 1:
            return
        tables = []
        for batch in (one.to(device) for one in batches):
            views = self.views(batch)
            with torch.no_grad():
                embedding_RE = model(only_views(batch, views), z_loss=0.0).embedding_RE
            tables.append(self._table(embedding_RE, batch, views))
        first, moved = 0, []
        for table in tables:  # records are numbered on through the micro-batches
            moved.append(table._replace(record_N=table.record_N + first))
            first += int(table.record_N.max()) + 1 if len(table.record_N) else 0
        whole = Table(*(torch.cat(parts) for parts in zip(*moved, strict=True)))
        loss_V, gradient_VE = self._solve(whole)
        sizes = [len(t.record_N) for t in tables]
        self._ahead.extend(zip(loss_V.split(sizes), gradient_VE.split(sizes), strict=True))

    def term(self, embedding_RE: torch.Tensor, batch: Batch) -> Term:
        """`embedding_RE` of the widened `batch`, the views last. Every rank must call it."""
        table = self._table(embedding_RE, batch, self.views(batch))
        if self._ahead:
            loss_V, gradient_VE = self._ahead.popleft()
        else:
            loss_V, gradient_VE = self._solve(table._replace(embedding_NE=table.embedding_NE.detach()))
        # its value is the loss of this micro-batch's views, its gradient that of the loss of the whole step
        led = (table.embedding_NE * gradient_VE).sum() + 0 * embedding_RE.sum()
        return Term(loss_V.sum() + led - led.detach(), self.weight)

    def _table(self, embedding_RE: torch.Tensor, batch: Batch, views: list[View]) -> Table:
        count = sum(len(one.record_V) for one in views)
        record_N = torch.cat([one.record_V for one in views])
        modality_N = torch.cat([torch.full_like(one.record_V, n) for n, one in enumerate(views)])
        last_NE = embedding_RE[len(embedding_RE) - count :].float() if count else embedding_RE[:0].float()
        return Table(last_NE, modality_N, batch.group_R[record_N], record_N)

    def _solve(self, mine: Table) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient of this rank's views, against those of all ranks."""
        whole, first = _gathered(mine) if self.across_ranks else (mine, 0)
        here = slice(first, first + len(mine.record_N))
        with torch.enable_grad():
            leaf_NE = whole.embedding_NE.detach().requires_grad_()
            loss_N = self.losses(whole._replace(embedding_NE=leaf_NE))
            (gradient_NE,) = torch.autograd.grad(loss_N.sum(), leaf_NE)
        return loss_N[here].detach(), gradient_NE[here]

    def losses(self, table: Table) -> torch.Tensor:
        """(N,) the loss of each view as the one that looks for its partners, half of it from each of the two sides."""
        loss_N = table.embedding_NE.new_zeros(len(table.record_N))
        numbers = {name: n for n, name in enumerate(self.modalities)}
        for pair in self.config.between:
            for a, b in (pair, pair[::-1]):
                of_a, of_b = ((table.modality_N == numbers[m]).nonzero()[:, 0] for m in (a, b))
                same_AB = table.record_N[of_a][:, None] == table.record_N[of_b]
                asked = same_AB.any(1)
                if not bool(asked.any()):
                    loss_N = loss_N + 0 * table.embedding_NE.sum()
                    continue
                of_a, same_AB = of_a[asked], same_AB[asked]
                score_AB = table.embedding_NE[of_a] @ table.embedding_NE[of_b].T / self.config.temperature
                alike_AB = (table.group_N[of_a][:, None] == table.group_N[of_b]) & ~same_AB
                score_AB = score_AB.masked_fill(alike_AB, -torch.inf)
                each_A = torch.nn.functional.cross_entropy(score_AB, same_AB.long().argmax(1), reduction="none")
                loss_N = loss_N.index_add(0, of_a, each_A / 2)
        return loss_N


def _without_features(batch: Batch) -> Batch:
    """The same rows of patches and mel frames, of no values."""
    return replace(batch, patches_PD=batch.patches_PD[:, :0], mels_MD=batch.mels_MD[:, :0])


def _gathered(mine: Table) -> tuple[Table, int]:
    """The views of all ranks in their order, their records numbered on, and where this rank's begin."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine, 0
    size, device = dist.get_world_size(), mine.embedding_NE.device
    records = int(mine.record_N.max()) + 1 if len(mine.record_N) else 0
    told = torch.tensor([len(mine.record_N), records], device=device)
    all_told = [torch.zeros_like(told) for _ in range(size)]
    dist.all_gather(all_told, told)
    counts, recorded = zip(*(t.tolist() for t in all_told), strict=True)
    rows = max(*counts, 1)
    # float64 holds a group's 52 bits and the numbers as well as the embeddings, so one gathering will do
    columns = [mine.embedding_NE.double(), *(x[:, None].double() for x in mine[1:])]
    packed = pad_rows(torch.cat(columns, 1), rows).contiguous()
    found = [torch.zeros_like(packed) for _ in range(size)]
    dist.all_gather(found, packed)
    parts, first, E = [], 0, mine.embedding_NE.shape[1]
    for part, count, of_rank in zip(found, counts, recorded, strict=True):
        modality_N, group_N, record_N = (part[:count, E + n].long() for n in range(3))
        parts.append(Table(part[:count, :E].float(), modality_N, group_N, record_N + first))
        first += of_rank
    rank = dist.get_rank()
    return Table(*(torch.cat(columns) for columns in zip(*parts, strict=True))), sum(counts[:rank])

"""The weighted sum of senses, without (B,K,T,T) weights or a (B,K,T,D) product in memory.

It equals the plain formula in Backpack._sum of model.py; letters in shape comments as there, and N slots. Three things
save time and memory:
- Queries go by blocks. A block sees no key behind it, which skips most of the masked half; its weights are forgotten
  after use (unless all is small), and backward computes them again from q and k.
- A block's weights of all senses lie side by side, so that the sum over keys and senses is one matrix product.
- Equal tokens of a sequence share a slot: their weights are added first, and as text repeats itself, the products get
  shorter. The number of slots must be known to go on, so this is for a CPU; elsewhere each position has its own.
"""
import torch
from torch.nn import functional as F

BLOCK = 128      # queries at once
CACHE = 2**22    # numbers that a CPU's cache holds, more or less


def eager_cpu(tensor):
    """Whether to read a number off a tensor costs no wait, and breaks no graph."""
    return tensor.device.type == "cpu" and type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def slots(where):
    """where (n,T) -> (rows (n,N), slot (n,T), used): the different tokens of each sequence as they first appear, which
    of them stands where, and how many the sequences have by the end of each block, at most."""
    T = where.size(1)
    last = [min(i + BLOCK, T) - 1 for i in range(0, T, BLOCK)]  # position of each block
    first = (where[:, :, None] == where[:, None, :]).byte().argmax(-1)                             # (n,T)
    seen = (first == torch.arange(T)).cumsum(-1)                                                   # (n,T)
    slot, used = seen.gather(1, first) - 1, seen[:, last].amax(0).tolist()
    return where.new_zeros(len(where), used[-1]).scatter_(1, slot, where), slot, used


def groups(q, k, senses, where):
    """Yield (sequences b, rows (n,N): which of senses the slots hold, C (n,N,K,D), blocks), n sequences at once.

    A block, the last comes first, is (queries i, keys j that they may see, alpha (n,K,t,S), slot (n,K,t,S) of each
    weight or None, C of the slots in use (n,N*K,D), alpha by slot (n,t,N*K)).
    """
    B, K, T, _ = q.shape
    n = max(1, (CACHE if q.device.type == "cpu" else 2**28) // (T * senses.size(1)))  # C fits a cache, or is large

    def block(b, C, slot, used, first):
        i, j = slice(first, first + BLOCK), slice(0, min(first + BLOCK, T))
        scores = q[b, :, i] @ k[b, :, j].mT                                                        # (n,K,t,S)
        scores[..., first:] += torch.full(2 * scores.shape[2:3], float("-inf"), device=q.device).triu(1)  # later keys
        alpha = by_slot = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        if slot is not None:
            slot = slot[:, None, None, j].expand(alpha.shape)                                      # (n,K,t,S)
            by_slot = alpha.new_zeros(*alpha.shape[:3], used).scatter_add_(3, slot, alpha)         # (n,K,t,N)
        return i, j, alpha, slot, C[:, :used].flatten(1, 2), by_slot.to(C.dtype).permute(0, 2, 3, 1).flatten(2)

    for b in (slice(start, start + n) for start in range(0, B, n)):
        rows, slot, used = slots(where[b]) if eager_cpu(where) else (where[b], None, range(BLOCK, T + BLOCK, BLOCK))
        C = F.embedding(rows, senses).to(q.dtype).unflatten(-1, (K, -1))                           # (n,N,K,D)
        yield b, rows, C, (block(b, C, slot, used[i // BLOCK], i) for i in reversed(range(0, T, BLOCK)))


class WeightedSum(torch.autograd.Function):
    """o_i = sum_j sum_l alpha[l,i,j] C(x_j)_l with alpha = softmax(q k^T), where a query sees no later key.

    q and k (B,K,T,d), senses of some tokens (U,K*D), which of these stands where (B,T) -> o (B,T,D).
    """
    @staticmethod
    def forward(ctx, q, k, senses, where):
        ctx.save_for_backward(q, k, senses, where)
        work, ctx.kept = groups(q, k, senses, where), None
        if q.size(2) <= BLOCK and where.numel() * senses.size(1) <= CACHE and eager_cpu(where):
            ctx.kept = work = [(*group, list(blocks)) for *group, blocks in work]  # one block, and small: keep it
        o = q.new_empty(q.size(0), q.size(2), senses.size(1) // q.size(1))                         # (B,T,D)
        for b, _, _, blocks in work:
            for i, _, _, _, C, alpha in blocks:
                o[b, i] = alpha @ C
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, senses, where = ctx.saved_tensors
        dq, dk = torch.empty_like(q), torch.zeros_like(k)
        dsenses = torch.zeros_like(senses, dtype=torch.promote_types(senses.dtype, torch.float32))
        for b, rows, whole, blocks in ctx.kept or groups(q, k, senses, where):
            dwhole = torch.empty_like(whole)
            for i, j, alpha, slot, C, by_slot in blocks:
                dC = dwhole.flatten(1, 2)[:, : C.size(1)]                                          # (n,N*K,D)
                dC.baddbmm_(by_slot.mT, do[b, i], beta=int(j.stop < q.size(2)))  # the first, of all slots, only writes
                dalpha = (do[b, i] @ C.mT).unflatten(2, (-1, q.size(1))).permute(0, 3, 1, 2)       # (n,K,t,N)
                dalpha = (dalpha if slot is None else dalpha.gather(3, slot)).to(alpha.dtype)      # (n,K,t,S)
                dscores = torch._softmax_backward_data(dalpha, alpha, -1, alpha.dtype).to(q.dtype)
                dq[b, :, i] = dscores @ k[b, :, j]
                dk[b, :, j] += dscores.mT @ q[b, :, i]
            dsenses.index_add_(0, rows.flatten(), dwhole.flatten(2).flatten(0, 1).to(dsenses.dtype))
        return dq, dk, dsenses.to(senses.dtype), None


weighted_sum = WeightedSum.apply

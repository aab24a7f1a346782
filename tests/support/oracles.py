"""Oracles, written the other way round from the code: double loops, one token at a time, whole distributions."""

import torch


def training_visibility(documents, block_len, phase=0):
    """Doubled row by double loop over (document, position, is_mask), from the words of the paper."""
    tokens = [(d, p, False) for d, n in enumerate(documents) for p in range(n)]
    tokens += [(d, p, True) for d, n in enumerate(documents) for p in range(n)]
    table = []
    for qd, qp, q_mask in tokens:
        row = []
        for kd, kp, k_mask in tokens:
            if qd != kd:
                row.append(False)
            elif not q_mask:
                row.append(not k_mask and kp <= qp)
            elif k_mask:
                row.append((kp + phase) // block_len == (qp + phase) // block_len)
            else:
                row.append(kp < (qp + phase) // block_len * block_len - phase)
        table.append(row)
    return torch.tensor(table)


def decode_visibility(prefix_len, block_len):
    """Rows: K drafts, then groups 1..K. Columns: prefix, drafts, groups. By double loop."""
    names = [("prefix", i, 0) for i in range(prefix_len)]
    rows = [("draft", j, 0) for j in range(1, block_len + 1)]
    rows += [("group", g, i) for g in range(1, block_len + 1) for i in range(block_len)]
    table = []
    for kind, a, _ in rows:
        line = []
        for key_kind, b, _ in names + rows:
            if key_kind == "prefix":
                line.append(True)
            elif key_kind == "draft":
                line.append(b <= a)
            else:
                line.append(kind == "group" and a == b)
        table.append(line)
    return torch.tensor(table)


def documents_row(*lengths, padding=0):
    """One packed row of documents of these lengths, as document ids [1, S]."""
    ids = [d for d, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor([ids + [-1] * padding])

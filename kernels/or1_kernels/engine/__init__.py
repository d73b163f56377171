"""Engine of the fused head: rows in chunks, three GEMMs a chunk, row passes between them.

chunked          the loop over chunks: logits, statistics, gradients
gemms            the three GEMMs, chosen by device and dtype
host             huge pages, and bf16 products with an fp32 result, on a CPU
policy           the policy loss and its gradients in one pass
compiled         the same as custom operators, for torch.compile
vocab_parallel   the vocabulary split over ranks
"""

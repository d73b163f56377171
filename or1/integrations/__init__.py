"""The fused head and MAGIC inside other trainers. Each module imports its library only when it is used."""

"""The fused head inside other trainers; each module imports its library only when it is used."""

"""What knows other libraries' conventions: diffusers' pipelines, ``torch.compile``."""

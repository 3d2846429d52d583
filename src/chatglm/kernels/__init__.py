"""Fast twins of slow functions: `gpu` (Triton), `cpu`. Chosen by `probe`, never imported by `model`."""

"""How an attempt is run on this machine: one port (`base.Executor`), one file per way."""

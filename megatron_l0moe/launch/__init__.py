"""Starting things: commands as text, processes, locks, the chain. No torch."""

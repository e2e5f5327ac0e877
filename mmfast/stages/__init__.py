"""Training stages on Lightning: modules, data modules, callbacks and presets. Needs `pip install mmfast[train]`."""

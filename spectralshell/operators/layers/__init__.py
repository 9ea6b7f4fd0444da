"""The exact kernel contracted layer by layer: rules, recording, units, stores, assembly."""

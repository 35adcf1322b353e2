"""The zarr v3 store: layout, commit ledger, reading, verification, garbage collection."""

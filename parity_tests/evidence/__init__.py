"""The evidence for each adapter, dtype and device, and where it was found."""

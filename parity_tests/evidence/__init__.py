"""What is known of which adapter, dtype and device."""

"""Networks that an asymmetric flow can wrap. None of them knows about asymmetric flow."""

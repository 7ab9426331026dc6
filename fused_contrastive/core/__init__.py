"""What a problem is: which logits are excluded, which reductions are asked, and whether the input makes sense."""

"""What a step needs: cards and their speed, operations of a forward and backward pass, memory."""

"""What a run says about itself: records, rates, health, and the places that show them."""

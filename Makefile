lab test docs bench outputs readme clean:
	@echo "not here yet: $@"
.PHONY: lab test docs bench outputs readme clean

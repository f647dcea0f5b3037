// Runs inputs from files through the target, for compilers without libFuzzer.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv)
{
	static uint8_t buffer[1 << 16];

	for (int i = 1; i < argc; i++) {
		FILE *file = fopen(argv[i], "rb");
		size_t size;
		uint8_t *exact;

		if (!file) {
			perror(argv[i]);
			return 1;
		}
		size = fread(buffer, 1, sizeof(buffer), file);
		fclose(file);
		// In a block of its own, so that the sanitizer sees reads beyond it.
		exact = malloc(size ? size : 1);
		for (size_t at = 0; at < size; at++)
			exact[at] = buffer[at];
		LLVMFuzzerTestOneInput(exact, size);
		free(exact);
	}
	printf("%d inputs\n", argc - 1);
	return 0;
}

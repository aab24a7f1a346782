/* Matrix instructions of a processor, computed by plain C, so that code that uses them runs on any processor.
 *
 * A tile has up to 16 rows of 64 bytes. The compiler reads this file before each source.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AMX_TILE__ 1
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

struct tile { int rows, bytes; union { char byte[64]; float number[16]; uint16_t half[32]; } row[16]; };
static __thread struct tile tiles[8];

static inline void _tile_loadconfig(const void *config) {
    for (int n = 0; n < 8; n++) {
        uint16_t bytes;
        memcpy(&bytes, (const char *)config + 16 + 2 * n, 2);
        tiles[n].bytes = bytes;
        tiles[n].rows = ((const uint8_t *)config)[48 + n];
    }
}

static inline void _tile_release(void) { memset(tiles, 0, sizeof tiles); }

static inline void _tile_zero(int tile) { memset(tiles[tile].row, 0, sizeof tiles[tile].row); }

static inline void _tile_loadd(int tile, const void *from, long stride) {
    _tile_zero(tile);
    for (int r = 0; r < tiles[tile].rows; r++)
        memcpy(tiles[tile].row[r].byte, (const char *)from + r * stride, tiles[tile].bytes);
}

static inline void _tile_stored(int tile, void *to, long stride) {
    for (int r = 0; r < tiles[tile].rows; r++)
        memcpy((char *)to + r * stride, tiles[tile].row[r].byte, tiles[tile].bytes);
}

static inline float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

/* Sums, to which the products of pairs in the rows of `left` and in the columns of `right` are added. */
static inline void _tile_dpbf16ps(int sum, int left, int right) {
    for (int m = 0; m < tiles[sum].rows; m++)
        for (int n = 0; n < tiles[sum].bytes / 4; n++)
            for (int k = 0; k < tiles[left].bytes / 2; k++)
                tiles[sum].row[m].number[n] += widened(tiles[left].row[m].half[k]) *
                                               widened(tiles[right].row[k / 2].half[2 * n + k % 2]);
}

/* Matrix instructions of the processor, if it has some. */
#ifdef __AMX_TILE__
#include <immintrin.h>
#include <stdint.h>
#endif

/* Whether this process may use them; `start` finds out. */
extern int matrices;

#ifdef __AMX_TILE__
/* Prepare the thread's 8 tiles of 64 bytes a row: tiles 0 to 2 have `rows` of 1..16 rows, the others 16. */
static inline void configure_tiles(int rows) {
    struct { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
    for (int n = 0; n < 8; n++) tiles.bytes[n] = 64, tiles.rows[n] = n < 3 ? rows : 16;
    _tile_loadconfig(&tiles);
}
#endif

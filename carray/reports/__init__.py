"""reports: a folder of predictions -> one page that shows what is in the bucket, for people who will not ask SQL.

1. tallies      predictions -> every number of the page, aggregated where the rows lie; no row is loaded
2. samples      predictions -> the few hundred rows that are shown one by one, the same ones for the same seed
3. thumbnails   their images, read again -> small JPEGs inside the page, or the reason why there is none
4. figures      tallies -> pictures
5. cards        rows and thumbnails -> what a gallery shows of each
6. predictions  all of it -> the page (page.html.j2 with page.css.j2, gallery.html.j2 and gallery.js.j2)
"""
